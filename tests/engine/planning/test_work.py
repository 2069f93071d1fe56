"""What weight-space methods hold while they work on whole tensors, and how many do so at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from conftest import plan_of
from weight_space import combine

from engine.methods import registry
from engine.methods.options import Footprint
from engine.planning.costs.flops import most_work, work_bytes
from engine.shards import weight_space


def test_work_counts_copies_of_the_tensor_and_squares_of_its_inputs() -> None:
    assert Footprint().nbytes((3, 5), 4) == 4 * 8 * 15
    assert Footprint(2, per_expert=1, squares=7).nbytes((3, 5), 4) == 4 * (6 * 15 + 7 * 25)
    assert Footprint(squares=7).nbytes((5,), 4) == 4 * 8 * 5


@pytest.mark.parametrize(("method", "holds"), [("ties", False), ("svd", True), ("swudi", True)])
def test_the_tensor_with_most_work_is_named(llama_merge: Path, method: str, holds: bool) -> None:
    plan = plan_of(llama_merge, f"merge_method={method}")
    name, nbytes = most_work(plan)
    assert nbytes == max(work_bytes(plan, name) for name in plan.merged)
    assert (name in plan.merged, nbytes > 0) == (holds, holds)


def test_memory_bounds_how_many_tensors_are_worked_on(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(llama_merge, "merge_method=svd")
    monkeypatch.setattr(weight_space, "DECOMPOSING_BYTES", 1)
    monkeypatch.setattr(weight_space, "usable_memory", lambda: 2)
    lock, at_work, prepare = threading.Lock(), 0, registry.preparation("svd")

    def alone(tensor: object) -> object:
        nonlocal at_work
        with lock:
            at_work += 1
            assert at_work == 1
        try:
            return prepare(tensor)  # type: ignore[arg-type]
        finally:
            with lock:
                at_work -= 1

    whole = combine(plan, tmp_path / "whole")
    monkeypatch.setattr(weight_space, "preparation", lambda name: alone)
    few = combine(plan, tmp_path / "few")
    assert (few / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
