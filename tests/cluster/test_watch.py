"""How failures of Ray are classified: as an error that ends the run, or as a loss from which the run continues."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from errors import refused
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

import cluster.ray_watch
import cluster.watch
from cluster.ray_watch import RayWatch
from cluster.watch import MOST_SILENCE, TRIES, Hung, Lost, until_done
from engine.errors import CheckpointError, ClusterError, MergeError, RunError


class Actor:
    """Stands in for the handle of an actor."""

    def __init__(self, name: str) -> None:
        self._actor_id = name.encode()
        self.__ray_ready__ = SimpleNamespace(remote=lambda: f"call of {name}")


class FakeRay:
    """Stands in for Ray. References are names; those in `values` are ready, and a value that is an error is raised."""

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
        return [
            {"NodeID": name, "Alive": name in self.alive, "NodeManagerAddress": f"10.0.0.{number}"}
            for number, name in enumerate("abc")
        ]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(cluster.ray_watch, "ray", SimpleNamespace(wait=fake.wait, get=fake.get, nodes=fake.nodes))
    monkeypatch.setattr(cluster.ray_watch, "restarts", dict)
    for module in (cluster.watch, cluster.ray_watch):
        monkeypatch.setattr(module, "LOOK_EVERY", 0.0)
    return fake


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("step", "a traceback of many lines", cause)


def test_one_line_says_that_an_actor_died(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, int] = {}
    counts = iter([0, 1, 1, 2, 2])

    def turn() -> None:
        count = next(counts, None)
        if count is None:
            fake.values["x"] = 1
        elif count:
            found[b"t".hex()] = count

    fake.turns = turn
    monkeypatch.setattr(cluster.ray_watch, "restarts", lambda: found)
    lines: list[str] = []
    watch = RayWatch(lines.append)
    watch.on(Actor("s"), "a", "shard 0")
    watch.on(Actor("t"), "a", "the trainer")
    assert watch.answer("x", "taking a step") == 1
    assert len(lines) == 2 and all("the trainer died" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "kind", "do", "facts"),
    [
        (failed(CheckpointError("NaN", "x.safetensors")), CheckpointError, "", ["x.safetensors"]),
        (failed(failed(RunError("NaN"))), RunError, "", ["NaN"]),
        (failed(KeyError("x")), RunError, "--debug", ["merging", "KeyError"]),
        (ActorDiedError(), RunError, "", ["merging"]),
        (failed(ActorDiedError()), RunError, "", ["merging"]),
        (OutOfDiskError(), RunError, "--object-spilling-directory", ["merging"]),
        (failed(OutOfDiskError()), RunError, "--object-store-memory", ["merging"]),
        (OutOfMemoryError("killed"), RunError, "`plan`", ["merging"]),
        (RuntimeEnvSetupError("no pip"), ClusterError, "RAY_RUNTIME_ENV_HOOK", ["no pip"]),
        (RayError("strange"), RunError, "", ["merging", "RayError", "strange"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failure_that_ends_the_run(
    fake: FakeRay, error: Exception, kind: type[MergeError], do: str, facts: list[str]
) -> None:
    fake.values["x"] = error
    with refused(kind, do=do, facts=facts) as raised:
        RayWatch(print).answer("x", "merging")
    assert type(raised.value) is kind
    assert "traceback" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ObjectLostError("00", "owner", "site"), "ObjectLostError"),
        (failed(OwnerDiedError("00", "owner", "site")), "OwnerDiedError"),
        (ActorUnschedulableError("its node does not exist any more"), "ActorUnschedulableError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_from_which_the_run_continues(fake: FakeRay, error: Exception, name: str) -> None:
    fake.values["x"] = error
    with pytest.raises(Lost, match=name):
        RayWatch(print).answer("x", "merging")


def test_a_node_with_an_actor_of_ours_is_missed_at_once(fake: FakeRay) -> None:
    watch = RayWatch(print)
    watch.on("trainer", "a", "the trainer")
    watch.on("expert", "b", "an expert")
    watch.gone("expert")
    looks = itertools.count()
    fake.turns = lambda: fake.alive.discard("b" if next(looks) < 3 else "a")
    with pytest.raises(Lost, match=r"\b1\b"):
        watch.answer("never", "waiting")
    assert next(looks) > 3, "the loss of a node without an actor in use is ignored"


def test_a_death_that_a_node_s_loss_explains_is_a_loss(fake: FakeRay) -> None:
    watch = RayWatch(print)
    watch.on("trainer", "b", "the trainer")
    fake.alive.discard("b")
    fake.values["x"] = ActorDiedError()
    with pytest.raises(Lost):
        watch.answer("x", "merging")


def test_later_references_are_served_while_another_is_waited_for(fake: FakeRay) -> None:
    watch, served = RayWatch(print), []

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
    fake.values["bad"] = failed(RunError("NaN"))
    watch.later("bad", then, "more")
    with refused(RunError, facts=["NaN"]):
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
    RayWatch(lines.append).answer("x", "taking a step")
    assert len(lines) >= 4 and all("taking a step" in line for line in lines)


def test_a_loss_is_gone_on_from_as_long_as_the_run_gets_further() -> None:
    said: list[str] = []
    stands = itertools.count()
    attempts = itertools.count(1)

    def attempt() -> str:
        if next(attempts) <= 2 * TRIES:
            raise Lost("node-7")
        return "done"

    assert until_done(attempt, lambda: next(stands), said.append) == "done"
    assert len(said) == 2 * TRIES and all("node-7" in line for line in said)


def test_a_loss_that_repeats_without_getting_further_is_the_end() -> None:
    attempts: list[int] = []

    def attempt() -> None:
        attempts.append(1)
        raise Lost("node-7")

    with refused(RunError, facts=[str(TRIES), "node-7"]):
        until_done(attempt, lambda: "here", print)
    assert len(attempts) == TRIES


class Clock:
    """Time that passes in `wait` alone: `step` seconds each."""

    def __init__(self, fake: FakeRay, monkeypatch: pytest.MonkeyPatch, step: float = 5.0) -> None:
        self.now, self.step, self.waits = 0.0, step, 0
        self.then: Callable[[int], object] = lambda _: None
        fake.turns = self.turn
        monkeypatch.setattr(cluster.watch, "time", SimpleNamespace(monotonic=lambda: self.now))

    def turn(self) -> None:
        self.now += self.step
        self.waits += 1
        self.then(self.waits)
        assert self.waits < 10_000, "it never ends"


def test_an_actor_that_returns_nothing_hangs(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(fake, monkeypatch)
    with pytest.raises(Hung, match="1005"):
        RayWatch(print, patience=1000).answer("never", "waiting")
    assert 1000 < clock.now < 2100, "one call of `wait` asks without waiting, in the beginning"
    clock.then = lambda number: number < 5000 or fake.values.update(late=1)
    assert RayWatch(print).answer("late", "waiting") == 1, "no bound"


def test_an_actor_that_hangs_is_named_with_its_node(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer waits for a shard, so neither answers; the other shard does, and an expert has no seat yet."""
    Clock(fake, monkeypatch)
    watch = RayWatch(print, patience=1000)

    def actor(name: str, node: str) -> Any:
        handle = Actor(name)
        watch.on(handle, node, name)
        return handle

    for name, node in (("shard 0", "a"), ("shard 1", "b"), ("the trainer", "b")):
        actor(name, node)
    fake.values["call of shard 0"] = True
    watch.later("seat", print, "starting", unseated=actor("an expert", "a"))
    with pytest.raises(Hung) as caught:
        watch.answer("never", "waiting")
    assert "shard 1 on node 10.0.0.1, the trainer on node 10.0.0.1" in str(caught.value)
    assert "shard 0" not in str(caught.value) and "an expert" not in str(caught.value)


def test_a_run_that_is_slow_does_not_hang(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result comes just before the bound, in any wait and for any reference."""
    clock, served = Clock(fake, monkeypatch), list[str]()
    clock.then = lambda number: number % 190 or fake.values.update({f"late {number // 190}": ""})
    watch = RayWatch(print, patience=1000)
    for number in range(1, 6):
        watch.later(f"late {number}", lambda _: served.append(""), "more")
    watch.later("never", served.append, "more")
    watch.until(lambda: len(served) == 3, "waiting")
    assert watch.answer("late 6", "waiting") == "" and len(served) == 5
    with pytest.raises(Hung):
        watch.until(lambda: False, "waiting")


def test_an_actor_without_a_seat_may_be_silent(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, served = Clock(fake, monkeypatch), list[str]()
    clock.then = lambda number: number < 5000 or fake.values.update(seat="there")
    watch = RayWatch(print, patience=1000)
    watch.later("seat", served.append, "starting", unseated="an actor")
    watch.until(lambda: bool(served), "waiting")
    watch.later("another seat", served.append, "starting", unseated="an actor")
    with pytest.raises(Hung):
        watch.answer("never", "waiting")


def test_time_in_which_the_driver_was_stopped_does_not_count(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(fake, monkeypatch, step=100_000.0)
    clock.then = lambda number: number < 50 or fake.values.update(late=1)
    assert RayWatch(print, patience=50 * MOST_SILENCE).answer("late", "waiting") == 1


def test_a_hang_that_repeats_is_the_end_and_names_the_option() -> None:
    def attempt() -> None:
        raise Hung("silent")

    with refused(RunError, do="`cluster.hang`", facts=[str(TRIES), "silent"]):
        until_done(attempt, lambda: "here", print)
