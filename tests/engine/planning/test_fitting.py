"""Settings that are named to make an actor fit its GPUs: each suffices, none is made already."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import plan_of

from engine.planning.costs.fitting import Role, capacity, enough_gpus, needed, remedies, shortages
from engine.planning.costs.rates import GB
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.costs.trainers import settled
from engine.planning.plan import Plan

WORK = Work(tokens=2000, samples=8, steps=4, passes=1, pass_tokens=64)
NODE = Machines(nodes=1, cpus=8, gpus=8, memory=1000 * GB)


@pytest.fixture
def large(llama_merge: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Makes plans of the tiny model as if nothing else took memory, and gradients left piece by piece."""
    monkeypatch.setattr("engine.planning.costs.scaling.TRAINER_BYTES", 0)
    monkeypatch.setattr("engine.planning.costs.scaling.LOGIT_BYTES", 0)
    monkeypatch.setattr("engine.planning.costs.scaling.WINDOW_BYTES", 1000)
    return lambda *overrides: plan_of(llama_merge, "cluster.factors=never", "cluster.shards=0", *overrides)


def least(plan: Plan, role: Role) -> float:
    # Task vectors in the trainer: their buffers would be a part that no setting changes.
    return needed(choose(plan, WORK, NODE).memory, role)


def with_settings(make: Callable[..., Plan], text: str) -> tuple[Plan, float]:
    """The plan with the settings of an advice, and the number of GPUs."""
    settings = [setting.replace(": ", "=") for setting in re.findall("`(.+?)`", text)]
    gpus = [setting for setting in settings if "num_gpus" in setting]
    plan = make(*settings)
    return plan, float(gpus[0].partition("=")[2]) if gpus else 1


@pytest.mark.parametrize("role", ["trainer", "expert"])
@pytest.mark.parametrize("share", [0.97, 0.8, 0.6, 0.4, 0.2])
def test_every_setting_suffices_alone_or_all_together(
    large: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, role: Role, share: float
) -> None:
    monkeypatch.setattr("engine.planning.costs.scaling.BLOCK", 1)
    plan = large()
    machines = replace(NODE, gpu_memory=share * least(plan, role))
    assert machines.gpu_memory is not None
    advice = remedies(plan, WORK, machines, role, 1, 8)
    assert advice
    for part in advice.split(" or "):
        changed, gpus = with_settings(large, part)
        assert least(changed, role) <= capacity(machines.gpu_memory, gpus), part
    assert role == "trainer" or "gradient" not in advice


def test_what_is_set_is_not_named(large: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.planning.costs.scaling.BLOCK", 1)
    set_already = {
        "`gradients: stream`": "gradients=stream",
        "`gradient_checkpointing: true`": "gradient_checkpointing=true",
        "`dtype: bfloat16`": "dtype=bfloat16",
    }
    for name, override in set_already.items():
        plan = large(override)
        machines = replace(NODE, gpu_memory=0.99 * least(plan, "trainer"))
        advice = remedies(plan, WORK, machines, "trainer", 1, 1)
        assert name not in advice and advice
    everything = large(*set_already.values())
    machines = replace(NODE, gpu_memory=0.99 * least(everything, "trainer"))
    assert remedies(everything, WORK, machines, "trainer", 1, 1) == "", "one GPU a node"
    assert remedies(everything, WORK, machines, "trainer", 1, 2) == "`cluster.trainer.num_gpus: 2`"


def test_the_smallest_number_of_gpus_is_named(large: Callable[..., Plan]) -> None:
    plan = large()
    machines = replace(NODE, gpu_memory=least(plan, "trainer") / 2.5)
    assert enough_gpus(plan, WORK, machines, "trainer", 1, 8) == 3
    assert enough_gpus(plan, WORK, machines, "trainer", 1, 2) is None
    assert enough_gpus(plan, WORK, machines, "trainer", 0.5, 8) == 3
    assert enough_gpus(plan, WORK, machines, "trainer", 3, 8) == 4, "more than before"


def test_factors_leave_room_for_a_step(llama_merge: Path) -> None:
    """What does not fit a GPU is copied to it: a trainer that keeps factors elsewhere is no shortage."""
    plan = plan_of(llama_merge, "cluster.factors=always", "parameters.task_vectors=orthogonal")
    least_of_it = least(plan, "trainer")
    held = choose(plan, WORK, NODE).memory
    assert held.trainer > least_of_it and held.copied == 0
    tight = choose(plan, WORK, replace(NODE, gpu_memory=(held.trainer + least_of_it) / 2)).memory
    assert tight.trainer <= (held.trainer + least_of_it) / 2 + 1
    assert tight.copied > 0


@pytest.mark.parametrize("share", [0.97, 0.6])
def test_a_node_without_gpus_fits_with_the_settings_that_are_named(
    large: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr("engine.planning.costs.scaling.BLOCK", 1)
    plan = large()
    node = replace(NODE, gpus=0)
    node = replace(node, memory=share * choose(plan, WORK, node).memory.trainer)
    line = next(
        line for line in shortages(plan, WORK, choose(plan, WORK, node), node) if line.startswith("the trainer")
    )
    for part in line.partition("set ")[2].partition(", or use")[0].split(" or "):
        changed, _ = with_settings(large, part)
        found = shortages(changed, WORK, choose(changed, WORK, node), node)
        assert not any(line.startswith("the trainer") for line in found), part


def test_gpus_that_no_node_has_are_a_shortage(large: Callable[..., Plan]) -> None:
    asking = large("cluster.trainer.num_gpus=2")
    for gpus, advice in ((0, "0 or auto"), (1, "at most 1")):
        node = replace(NODE, gpus=gpus)
        (line,) = shortages(asking, WORK, choose(asking, WORK, node), node)
        assert line.startswith("the trainer") and line.endswith(f"`cluster.trainer.num_gpus`: {advice}")


def test_a_plan_has_the_gpus_that_an_actor_with_auto_gets(large: Callable[..., Plan]) -> None:
    plan = large()
    tokens = [[64] * 8] * len(plan.experts)
    small = replace(NODE, gpu_memory=least(plan, "trainer") / 2.5)
    made, work, machines = settled(plan, tokens, small)
    assert made.config.cluster.trainer.num_gpus == 3
    assert shortages(made, work, choose(made, work, machines), machines) == []
    roomy, *_ = settled(plan, tokens, replace(NODE, gpu_memory=100 * GB))
    assert roomy.config.cluster.trainer.num_gpus == "auto"
