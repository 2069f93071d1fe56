"""What a failure of Ray's means to a run: the end, in our words, or a loss from which it goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayError,
    RayTaskError,
)

import cluster.watch
from cluster.watch import TRIES, Lost, Watch, until_done
from engine.errors import CheckpointError, MergeError, RunError


class FakeRay:
    """References are names; `values` are there, and what is an error is raised."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.alive = {"a", "b"}
        self.turns: Callable[[], None] = lambda: None

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        self.turns()
        ready = [one for one in references if one in self.values][:1]
        return ready, [one for one in references if one not in ready]

    def get(self, reference: str) -> Any:
        value = self.values[reference]
        if isinstance(value, BaseException):
            raise value
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": name in self.alive} for name in ("a", "b", "c")]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(cluster.watch, "ray", SimpleNamespace(wait=fake.wait, get=fake.get, nodes=fake.nodes))
    monkeypatch.setattr(cluster.watch, "LOOK_EVERY", 0.0)
    return fake


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("step", "a traceback of many lines", cause)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (failed(CheckpointError("a weight is not finite", "x.safetensors")), CheckpointError, "a weight is not finite"),
        (failed(failed(RunError("the loss is not finite"))), RunError, "the loss is not finite"),
        (failed(KeyError("x")), RunError, "an actor failed while merging: KeyError"),
        (ActorDiedError(), RunError, "an actor died while merging, and again when started anew"),
        (failed(ActorDiedError()), RunError, "an actor died while merging"),
        (OutOfDiskError(), RunError, "the disk to which Ray's object store spills is full"),
        (failed(OutOfDiskError()), RunError, "spills is full"),
        (OutOfMemoryError("killed"), RunError, "a node ran out of memory while merging"),
        (RayError("strange"), RunError, "Ray failed while merging: RayError: strange"),
        (ObjectLostError("00", "owner", "site"), Lost, "ObjectLostError"),
        (failed(OwnerDiedError("00", "owner", "site")), Lost, "OwnerDiedError"),
        (ActorUnschedulableError("its node does not exist any more"), Lost, "an actor's node is gone"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_a_failure_means(fake: FakeRay, error: Exception, kind: type[Exception], text: str) -> None:
    fake.values["x"] = error
    with pytest.raises(kind) as raised:
        Watch(print).answer("x", "merging")
    assert text in str(raised.value)
    assert not isinstance(raised.value, MergeError) or "traceback" not in str(raised.value)


def test_a_node_with_an_actor_of_ours_is_missed_at_once(fake: FakeRay) -> None:
    watch = Watch(print)
    watch.on("trainer", "a")
    watch.on("expert", "b")
    watch.gone("expert")
    looks = itertools.count()
    fake.turns = lambda: fake.alive.discard("b" if next(looks) < 3 else "a")
    with pytest.raises(Lost, match="1 of the nodes in use is gone"):
        watch.answer("never", "waiting")
    assert next(looks) > 3, "a node without anybody of ours does not matter"


def test_a_death_that_a_node_s_loss_explains_is_a_loss(fake: FakeRay) -> None:
    watch = Watch(print)
    watch.on("trainer", "b")
    fake.alive.discard("b")
    fake.values["x"] = ActorDiedError()
    with pytest.raises(Lost):
        watch.answer("x", "merging")


def test_later_references_are_served_while_another_is_waited_for(fake: FakeRay) -> None:
    watch, served = Watch(print), []

    def then(value: int) -> None:
        served.append(value)
        if value < 3:
            fake.values[f"late {value + 1}"] = value + 1
            watch.later(f"late {value + 1}", then, "more")
        else:
            fake.values["wanted"] = "there"

    fake.values["late 1"] = 1
    watch.later("late 1", then, "more")
    watch.later("forgotten", then, "more")
    watch.forget("forgotten")
    assert watch.answer("wanted", "waiting") == "there"
    assert served == [1, 2, 3]
    fake.values["bad"] = failed(RunError("no"))
    watch.later("bad", then, "more")
    with pytest.raises(RunError, match="no"):
        watch.until(lambda: False, "waiting")


def test_a_heartbeat_while_nothing_comes(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 7)
    monkeypatch.setattr(cluster.watch, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    lines: list[str] = []
    turns = itertools.count()

    def come() -> None:
        if next(turns) == 40:
            fake.values["x"] = 1

    fake.turns = come
    Watch(lines.append).answer("x", "taking a step")
    assert len(lines) >= 4 and lines[0].startswith("still taking a step, ")


def test_a_loss_is_gone_on_from_as_long_as_the_run_gets_further() -> None:
    said: list[str] = []
    stands = itertools.count()
    attempts = itertools.count(1)

    def attempt() -> str:
        if next(attempts) <= 2 * TRIES:
            raise Lost("a node is gone")
        return "done"

    assert until_done(attempt, lambda: next(stands), said.append) == "done"
    assert len(said) == 2 * TRIES and "going on from what is stored" in said[0]


def test_a_loss_that_repeats_without_getting_further_is_the_end() -> None:
    attempts: list[int] = []

    def attempt() -> None:
        attempts.append(1)
        raise Lost("a node is gone")

    with pytest.raises(RunError, match=f"{TRIES} tries in a row came no further: a node is gone"):
        until_done(attempt, lambda: "here", print)
    assert len(attempts) == TRIES
