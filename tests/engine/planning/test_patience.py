"""The bound after which actors count as hung: far above the estimates, and never below minutes unless configured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import plan_of

from engine.planning.costs.patience import FLOOR, SLOWER, patience
from engine.planning.costs.rates import DISK, GB
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.plan import Plan

WORK = Work(tokens=64, samples=16, steps=2, passes=2, pass_tokens=256)
CPU = Machines(nodes=1, cpus=2, gpus=0, memory=24 * GB)


def larger(plan: Plan, factor: int) -> Plan:
    """Return the plan with `factor` times as many rows and columns in every matrix of the base and the experts."""

    def grown(model):
        tensors = {
            name: replace(tensor, shape=tuple(size * factor for size in tensor.shape))
            for name, tensor in model.header.tensors.items()
        }
        return replace(model, header=replace(model.header, tensors=tensors))

    return replace(plan, base=grown(plan.base), experts=tuple(grown(expert) for expert in plan.experts))


def test_small_merges_have_the_floor_and_the_config_comes_first(llama_merge: Path) -> None:
    assert patience(plan_of(llama_merge), CPU, 1, WORK) == FLOOR >= 600
    assert patience(plan_of(llama_merge, "merge_method=linear"), CPU, 1) == FLOOR
    assert patience(plan_of(llama_merge, "cluster.hang=2.5"), CPU, 1, WORK) == 2.5


@pytest.mark.parametrize("task_vectors", ["whole", "orthogonal"])
def test_a_large_merge_has_many_times_its_longest_call(llama_merge: Path, task_vectors: str) -> None:
    plan = larger(plan_of(llama_merge, f"parameters.task_vectors={task_vectors}"), 500)
    whole = sum(t.nbytes for model in (plan.base, *plan.experts) for t in model.header.tensors.values())
    bound = patience(plan, CPU, 1, WORK)
    assert bound >= SLOWER * whole / DISK > FLOOR
    assert bound >= SLOWER * choose(plan, WORK, CPU).step.total
    if task_vectors == "whole":
        assert patience(plan, CPU, 1, replace(WORK, tokens=5000, pass_tokens=5000)) > bound
    slow = replace(plan, config=plan.config.model_copy(update={"cluster": slower(plan)}))
    assert patience(slow, CPU, 1, WORK) > bound


def slower(plan: Plan):
    rates = {"compute_tflops": 1e-6, "disk_gbs": 1e-4}
    return plan.config.cluster.model_copy(
        update={"rates": plan.config.cluster.rates.model_copy(update=rates)},
    )


def test_decompositions_and_whole_matrices_take_longer(llama_merge: Path, make_merge: Callable[..., Path]) -> None:
    def bound(*options: str) -> float:
        plan = larger(plan_of(llama_merge, *options), 500)
        return patience(plan, CPU, 1, WORK if plan.config.learned else None)

    assert bound("parameters.task_vectors=orthogonal") > bound("parameters.task_vectors=whole")
    assert bound("merge_method=wudi") > bound("merge_method=linear")
    assert bound("merge_method=wudi", "max_shard_size=1KB") < bound("merge_method=wudi")


@pytest.mark.parametrize("method", ["expert_merging", "task_arithmetic"])
def test_steps_of_whole_matrices_take_longer(llama_merge: Path, method: str) -> None:
    work = WORK if method == "expert_merging" else None
    plain, stepped = (
        patience(larger(plan_of(llama_merge, f"merge_method={method}", f"calibrate={steps}"), 500), CPU, 1, work)
        for steps in ("[]", "svc")
    )
    assert stepped > plain


def test_samples_on_which_models_run_take_longer(llama_merge: Path) -> None:
    def bound(tokens: int, *options: str) -> float:
        return patience(larger(plan_of(llama_merge, *options), 100), CPU, 1, tokens=[[tokens], [100]])

    for options in (
        ["merge_method=lot"],
        ["merge_method=regmean_plus_plus"],
        ["merge_method=ties", "calibrate=featcal"],
    ):
        # Seconds of the passes of the longer of the two through all matrices, at 177 GFLOP/s.
        plan = larger(plan_of(llama_merge, *options), 100)
        matrices = [t.numel for t in plan.base_header.tensors.values() if len(t.shape) == 2]
        assert bound(100_000, *options) > SLOWER * 100_000 * 2 * sum(matrices) / 177e9 > FLOOR
    tokens = [[900] * 99, [9]]
    lot, rcp = (
        patience(larger(plan_of(llama_merge, f"merge_method={name}"), 300), CPU, 1, tokens=tokens)
        for name in ("lot", "rcp")
    )
    assert rcp > 2 * lot > 2 * FLOOR, "the samples pass several times"
    assert bound(100_000, "merge_method=linear") == bound(1, "merge_method=linear")
