"""The steps of a stage: when the trainer is asked for them, and when their state is stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import plan_of
from identities import ON_CPU
from plain import Plain

import cluster.stages
from actors.trainer import WindowSample
from cluster.stages import Stages
from engine.learning.learner import first_stage
from engine.planning.plan import Plan
from engine.run.inputs import identity
from engine.run.keys import Computing
from engine.run.reuse import Reuse
from engine.run.state import StageState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plan(llama_merge: Path) -> Plan:
    return plan_of(llama_merge, "parameters.epochs=2")


class Run:
    """A run whose trainer is in this process: what happens, in order, and the states that were stored.

    A step is taken when its result is asked for. `stored` says which samples have targets; `last` is the last state
    that can be stored.
    """

    def __init__(self, plan: Plan, folder: Path, last: int = 100) -> None:
        self.plain, self.last = Plain(plan, folder), last
        self.events: list[tuple[str, int]] = []
        self.states: dict[int, StageState] = {}
        self.stored: set[tuple[int, int]] = set(self.plain.targets)
        self.ahead: dict[int, int] = {}

    def save(self, number: int, state: StageState, rows: Sequence[Any]) -> None:
        self.events.append(("store", state.steps))
        if state.steps > self.last:
            raise OSError("the disk is full")
        self.states[number] = state

    def begin(
        self, stage: Any, state: Any, number: int, window: list[WindowSample], ahead: Sequence[WindowSample] = ()
    ) -> Any:
        self.events.append(("begin", number))
        self.ahead[number] = len(ahead)
        windows = (
            [WindowSample(one.sample, self.plain.targets[one.sample.expert, one.sample.index]) for one in some]
            for some in (window, ahead)
        )
        return lambda: self.plain.trainer.step(stage, state, number, *windows)

    def has(self, places: Sequence[tuple[int, int]]) -> bool:
        return self.stored.issuperset(places)

    def wait(self, places: Sequence[tuple[int, int]]) -> None:
        self.stored |= set(places)

    def take(self) -> np.ndarray:
        silent = SimpleNamespace(phase=lambda *_: None, step=lambda *_: None)
        folder = SimpleNamespace(
            save_stage=self.save,
            load_stage=self.states.get,
            target=lambda sample: "target",
            inputs=None,
            identity=identity(self.plain.plan),
            check_unchanged=lambda plan: None,
        )
        folder.reuse = Reuse(folder)
        attempt: Any = SimpleNamespace(
            plan=self.plain.plan,
            folder=folder,
            progress=silent,
            watch=SimpleNamespace(answer=lambda call, what: call()),
        )
        targets: Any = SimpleNamespace(has=self.has, stored=self.wait, nbytes=0)
        trainers: Any = SimpleNamespace(step=self.begin)
        stages = Stages(attempt, self.plain.samples, trainers, targets, Computing(ON_CPU, ()))
        return stages.stage(first_stage(self.plain.plan)).values


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.stages, "ray", SimpleNamespace(put=lambda value: value))


def test_the_next_step_begins_before_the_state_of_the_one_before_is_stored(plan: Plan, tmp_path: Path) -> None:
    run = Run(plan, tmp_path)
    values = run.take()
    steps = len(run.states) and run.states[1].steps
    assert steps > 3
    wanted = [("begin", 0)]
    for number in range(1, steps):
        wanted += [("begin", number), ("store", number)]
    assert run.events == [*wanted, ("store", steps)]
    assert [run.ahead[number] > 0 for number in range(steps)] == [True] * (steps - 1) + [False]
    np.testing.assert_array_equal(values, run.plain.learn(first_stage(plan)).values)


def test_a_run_that_stops_between_step_and_state_resumes_with_the_same_bits(plan: Plan, tmp_path: Path) -> None:
    whole = Run(plan, tmp_path / "whole")
    wanted = whole.take()
    run = Run(plan, tmp_path / "stopped", last=2)
    with pytest.raises(OSError, match="full"):
        run.take()
    assert run.states[1].steps == 2 and ("begin", 3) in run.events
    run.events.clear()
    run.last = 100
    np.testing.assert_array_equal(run.take(), wanted)
    assert run.events[0] == ("begin", 2)


def test_a_step_whose_targets_are_not_there_begins_after_the_state_is_stored(plan: Plan, tmp_path: Path) -> None:
    run = Run(plan, tmp_path)
    wanted = run.plain.learn(first_stage(plan)).values
    run.stored = set()
    np.testing.assert_array_equal(run.take(), wanted)
    assert run.events[:4] == [("begin", 0), ("store", 1), ("begin", 1), ("store", 2)]
    assert run.ahead[0] == 0
