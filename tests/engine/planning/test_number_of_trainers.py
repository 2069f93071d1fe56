"""The number of trainers, and how they hold the gradient: what is given, and what the scaling model chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import plan_of
from errors import refused

from engine.config.resources import GradientUse
from engine.errors import ConfigError
from engine.planning.costs.scaling import Machines, Work, predict
from engine.planning.costs.trainers import choose_trainers, settled, with_gradients
from engine.planning.plan import Plan
from engine.planning.summary import print_plan

TOKENS = [[512] * 8] * 2
WORK = Work(tokens=512, samples=16, steps=2, passes=8, pass_tokens=512)
CPUS, GPUS = Machines(1, 8, 0), Machines(1, 8, 8)


@pytest.fixture
def plan(make_merge: Callable[..., Path]) -> Plan:
    """A merge of matrices that have factors."""
    return plan_of(make_merge(), "parameters.task_vectors=orthogonal", "parameters.gradient_accumulation=8")


def given(plan: Plan, gradients: GradientUse, trainers: Any) -> Plan:
    cluster = plan.config.cluster.model_copy(update={"trainers": trainers})
    return with_gradients(replace(plan, config=plan.config.model_copy(update={"cluster": cluster})), gradients)


def wide(plan: Plan, factor: int) -> Plan:
    """Return the plan with `factor` times as many rows and columns in every tensor of base and experts."""

    def grown(model: Any) -> Any:
        sizes = {name: [factor * side for side in tensor.shape] for name, tensor in model.header.tensors.items()}
        tensors = {name: replace(model.header.tensors[name], shape=tuple(shape)) for name, shape in sizes.items()}
        return replace(model, header=replace(model.header, tensors=tensors))

    return replace(plan, base=grown(plan.base), experts=tuple(grown(expert) for expert in plan.experts))


@pytest.mark.parametrize(
    ("gradients", "trainers", "machines", "chosen"),
    [
        ("auto", "auto", CPUS, ("accumulate", 1)),
        ("stream", "auto", CPUS, ("stream", 1)),
        ("accumulate", "auto", GPUS, ("accumulate", 1)),
        ("auto", 1, CPUS, ("accumulate", 1)),
        ("auto", 2, CPUS, ("stream", 2)),
        ("stream", 3, GPUS, ("stream", 3)),
        ("stream", 1, GPUS, ("stream", 1)),
        ("stream", 100, GPUS, ("stream", 8)),
        ("auto", "auto", GPUS, ("stream", 8)),
        ("stream", "auto", GPUS, ("stream", 8)),
    ],
)
def test_what_is_given_is_kept_and_gpus_share_the_passes(
    plan: Plan, gradients: GradientUse, trainers: Any, machines: Machines, chosen: tuple[str, int]
) -> None:
    assert choose_trainers(given(plan, gradients, trainers), WORK, machines, seats=8) == chosen


@pytest.mark.parametrize(
    ("passes", "seats", "trainers"), [(1.0, 8, 1), (3.5, 8, 4), (8.0, 7, 4), (8.0, 3, 3), (8.0, 1, 1), (8.0, 0, 1)]
)
def test_no_trainer_is_of_no_use(plan: Plan, passes: float, seats: int, trainers: int) -> None:
    work = replace(WORK, passes=passes)
    assert choose_trainers(with_gradients(plan, "stream"), work, GPUS, seats) == ("stream", trainers)


@pytest.mark.parametrize("trainers", ["auto", 1])
def test_one_gpu_projects_once_a_window_where_that_takes_less_time(plan: Plan, trainers: Any) -> None:
    """The products with factors grow with the ranks, which are those of the matrices here, and a sum does not."""
    small = given(plan, "auto", trainers)
    assert choose_trainers(small, WORK, GPUS, seats=1) == ("stream", 1)
    assert choose_trainers(wide(small, 100), WORK, GPUS, seats=1) == ("accumulate", 1)
    assert choose_trainers(wide(plan, 100), WORK, GPUS, seats=8) == ("stream", 8)


def test_several_trainers_have_no_gradient_that_is_summed_over_the_window(make_merge: Callable[..., Path]) -> None:
    config = make_merge()
    with refused(ConfigError, where="cluster.trainers", facts=["accumulate", "2"], do="`gradients: stream`"):
        plan_of(config, "gradients=accumulate", "cluster.trainers=2")
    plan_of(config, "gradients=accumulate", "cluster.trainers=1")


def test_a_step_of_several_trainers_takes_as_long_as_the_slowest(plan: Plan) -> None:
    plan = with_gradients(plan, "stream")
    steps = [predict(plan, WORK, replace(GPUS, trainers=count), "trainer").step.total for count in (1, 4, 5, 8)]
    assert steps[0] > steps[1] == steps[2] > steps[3], "with two passes for the slowest of four and of five"


def test_dense_task_vectors_are_streamed_once_more_for_each_trainer(plan: Plan) -> None:
    cluster = plan.config.cluster.model_copy(update={"factors": "never"})
    dense = with_gradients(replace(plan, config=plan.config.model_copy(update={"cluster": cluster})), "stream")
    one, four = (predict(dense, WORK, replace(GPUS, trainers=count), "node") for count in (1, 4))
    assert four.moved == one.moved / (1 + WORK.passes) * (4 + WORK.passes)
    assert four.step.exchange > one.step.exchange and four.step.stream > one.step.stream


@pytest.mark.parametrize(
    ("machines", "trainers"), [(GPUS, 8), (replace(GPUS, nodes=2, gpus=2), 4), (CPUS, 1), (replace(GPUS, gpus=1), 1)]
)
def test_a_plan_assumes_that_every_gpu_has_a_trainer(plan: Plan, machines: Machines, trainers: int) -> None:
    chosen, _, there = settled(plan, TOKENS, machines)
    assert there == replace(machines, trainers=trainers)
    assert chosen.config.gradients == ("stream" if machines.gpus else "accumulate")


@pytest.mark.parametrize(("asked", "fewer"), [("auto", False), (3, False), (99, True)])
def test_a_plan_says_that_fewer_trainers_work_than_were_asked_for(
    plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: Any, fewer: bool
) -> None:
    print_plan(given(plan, "auto", asked), TOKENS, GPUS, str(tmp_path / "out"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trainers: ")]
    assert ("of 99" in line) == fewer
