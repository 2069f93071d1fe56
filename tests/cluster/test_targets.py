"""Surveys and targets: which actor computes which, when the trainer can start and when an actor is dismissed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from errors import refused

import cluster.ray_watch
from actors.process import Report
from cluster.ray_watch import RayWatch
from cluster.targets import TargetComputation
from engine.calibration.samples import Sample
from engine.errors import ClusterError
from engine.run.run_folder import RunFolder
from engine.shards.parts import Surveyed
from engine.sizes import GROUPS_PER_CALL

WANTED = [[Sample(k, i, (1, 2), "here") for i in range(2)] for k in range(5)]


class Machine:
    """Actors that answer one call per `wait`, in the order of the calls; those on `slow` seats never answer."""

    def __init__(self, seats: int, slow: frozenset[int]) -> None:
        self.seats, self.slow = seats, slow
        self.asked: list[tuple[str, int, Any]] = []
        self.values: dict[str, Any] = {}
        self.computed: list[tuple[int, int]] = []
        self.read: list[tuple[int, int]] = []
        self.by: dict[int, set[int]] = {}
        self.dismissed: list[int] = []
        self.at_once = 0

    def expert(self, seat: int) -> Any:
        def called(what: str) -> Callable[..., str]:
            def place(arguments: tuple[Any, ...]) -> Any:
                """What is read or computed; None for a question to the actor."""
                return {"survey": arguments[:2], "target": arguments[:1] and arguments[0]}.get(what)

            def remote(*arguments: Any) -> str:
                name = f"{what} {seat} {len(self.asked)}"
                self.asked.append((name, seat, place(arguments)))
                return name

            return remote

        calls = {what: SimpleNamespace(remote=called(what)) for what in ("ready", "report", "target", "survey")}
        return _Actor(seat=seat, **calls)

    def dismiss(self, actor: _Actor) -> None:
        assert actor.seat not in self.dismissed
        self.dismissed.append(actor.seat)

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        busy = {seat for name, seat, sample in self.asked if name not in self.values and sample is not None}
        self.at_once = max(self.at_once, len(busy))
        for name, seat, sample in self.asked:
            if name in references and name not in self.values and seat not in self.slow:
                self.values[name] = 100 if sample is not None else Report(f"expert {seat}", 1, 1, {})
                if isinstance(sample, tuple):
                    k, groups = sample
                    self.values[name] = {group: Surveyed((float(k), float(group))) for group in groups}
                    self.read += [(k, group) for group in groups]
                    self.by.setdefault(k, set()).add(seat)
                elif sample is not None:
                    self.computed.append((sample.expert, sample.index))
                    self.by.setdefault(sample.expert, set()).add(seat)
                return [name], []
        return [], references

    def get(self, name: str) -> Any:
        return self.values[name]


class _Actor(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def start(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seats: int,
    slow: frozenset[int] = frozenset(),
    wanted: Sequence[Sequence[Sample]] = WANTED,
    **surveys: Any,
) -> tuple[Machine, TargetComputation, list[int]]:
    machine, counts = Machine(seats, slow), list[int]()
    fake = SimpleNamespace(wait=machine.wait, get=machine.get, nodes=list)
    monkeypatch.setattr(cluster.ray_watch, "ray", fake)
    crew: Any = machine
    folder = RunFolder(str(tmp_path / "out"))
    attempt: Any = SimpleNamespace(
        watch=RayWatch(print),
        folder=folder,
        progress=SimpleNamespace(advance=lambda name, done: counts.append(done)),
    )
    waves = TargetComputation(attempt, crew, wanted, 3, **surveys)
    assert {name.split()[0] for name, *_ in machine.asked} == {"ready"}, "no work before the trainer is ready"
    waves.begin()
    return machine, waves, counts


@pytest.mark.parametrize("seats", [1, 2, 3, 9])
def test_every_target_is_computed_once_and_everybody_is_let_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seats: int
) -> None:
    machine, waves, counts = start(monkeypatch, tmp_path, seats)
    waves.all_stored()
    assert Counter(machine.computed) == Counter((s.expert, s.index) for mine in WANTED for s in mine)
    assert all(len(actors) == 1 for actors in machine.by.values()), "each expert is loaded by a single actor"
    assert counts == list(range(4, 14)), "continues after the three that were stored before"
    assert sorted(machine.dismissed) == list(range(min(seats, 5)))
    assert 1 <= len(waves.reports) <= min(seats, 5)
    assert machine.at_once <= seats
    assert waves.nbytes == 1000


def test_an_expert_that_is_not_ready_gets_no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check(free: object) -> None:
        raise ClusterError("too small")

    machine, waves, _ = start(monkeypatch, tmp_path, 2, needed=5.0, check=check)
    with refused(ClusterError):
        waves.all_stored()
    assert machine.computed == []


def test_the_first_window_does_not_wait_for_the_last_expert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine, waves, _ = start(monkeypatch, tmp_path, 2)
    waves.stored([(0, 0), (1, 1)])
    assert {(0, 0), (1, 1)} <= set(machine.computed)
    assert not any(expert == 4 for expert, _ in machine.computed)
    waves.stored([(4, 1)])
    assert (4, 1) in machine.computed


def test_a_seat_that_never_becomes_free_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine, waves, _ = start(monkeypatch, tmp_path, 3, slow=frozenset({1, 2}))
    waves.all_stored()
    assert len(machine.computed) == 10 and all(actors == {0} for actors in machine.by.values())
    assert sorted(machine.dismissed) == [0, 1, 2], "actors that never started are dismissed, too"


@pytest.mark.parametrize("seats", [1, 2, 9])
@pytest.mark.parametrize("wanted", [WANTED, []], ids=["with targets", "without targets"])
def test_an_expert_is_surveyed_where_its_targets_are_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seats: int, wanted: list[list[Sample]]
) -> None:
    groups: list[list[int]] = [[*range(9)], [], [3, 8], [0], []]
    before = {(k, group): Surveyed((-1.0,)) for k in range(5) for group in range(9) if group not in groups[k]}
    machine, waves, _ = start(monkeypatch, tmp_path, seats, wanted=wanted, groups=groups, surveyed=before)
    found = waves.surveyed()
    assert sorted(found) == [(k, group) for k in range(5) for group in range(9)]
    assert sorted(machine.read) == sorted((k, group) for k, mine in enumerate(groups) for group in mine)
    assert found[2, 3].magnitudes == (2.0, 3.0) and found[2, 4].magnitudes == (-1.0,), "of this start, of the earlier"
    waves.all_stored()
    assert Counter(machine.computed) == Counter((s.expert, s.index) for mine in wanted for s in mine)
    assert all(len(actors) == 1 for actors in machine.by.values()), "each expert is read by a single actor"
    assert set(machine.by) == (set(range(5)) if wanted else {0, 2, 3}), "no actor for an expert with nothing to do"
    assert sorted(machine.dismissed) == list(range(min(seats, len(machine.by))))
    first = {}
    for name, _, what in machine.asked:
        if what is not None:
            first.setdefault(what[0] if isinstance(what, tuple) else what.expert, name.split()[0])
    assert all(first[k] == "survey" for k in (0, 2, 3)), "a weight that is not finite is found before the first target"


def test_an_actor_has_bounded_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine, waves, _ = start(monkeypatch, tmp_path, 1, wanted=[], groups=[[*range(11)]])
    waves.all_stored()
    calls = [what[1] for name, _, what in machine.asked if name.startswith("survey")]
    assert [group for call in calls for group in call] == [*range(11)]
    assert max(map(len, calls)) == GROUPS_PER_CALL < 11
