"""Answers of actors waited for, while the cluster is watched: what failed, what was lost, and what can go on.

Turns Ray's failures into the project's errors, or into `Lost` where the state that is kept can be gone on from. Knows
no merging.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from engine.errors import MergeError, RunError

HEARTBEAT = 30.0


# How often the nodes are looked at; a node that is gone takes nothing along but what was on it.
LOOK_EVERY = 1.0


# How often a run goes on from its state without getting any further, before that is its end.
TRIES = 3


Result = TypeVar("Result")
Task = TypeVar("Task")
Worker = TypeVar("Worker")


class Lost(Exception):
    """A node or an object is gone; everything else is to be placed anew, and the run goes on from its state."""


class Watch:
    """Waits for references. Whatever is waited for, the references given to `later` are served in the meantime."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._nodes: dict[Any, str] = {}
        self._later: dict[Any, tuple[Callable[[Any], None], str]] = {}
        self._looked = 0.0

    def on(self, actor: Any, node: str) -> None:
        """Remember where an actor is: its node's loss is ours."""
        self._nodes[actor] = node

    def gone(self, actor: Any) -> None:
        """The actor was dismissed; its node does not matter any more for its sake."""
        self._nodes.pop(actor, None)

    def later(self, reference: Any, then: Callable[[Any], None], what: str) -> None:
        """Call `then` with the value of the reference when it is there and something is waited for."""
        self._later[reference] = then, what

    def forget(self, reference: Any) -> None:
        """Do not wait for a reference that was given to `later`."""
        self._later.pop(reference)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Serve the references given to `later` until `done`."""
        began = beat = time.monotonic()
        while not done():
            assert self._later, f"nothing to wait for: {what}"
            beat = self._turn([], began, beat, what)

    def answer(self, reference: Any, what: str) -> Any:
        """The value of one reference, with a line every half minute while it is not there; see `first`."""
        return self.first([reference], what)[1]

    def first(self, references: Iterable[Any], what: str) -> tuple[Any, Any]:
        """The first of the references to be there, and its value.

        Raises:
            MergeError: one that an actor raised, as it was raised there.
            RunError: an actor died more often than it is started again, or failed in a way that we did not foresee.
            Lost: a node is gone on which an actor was, or an object that no actor can give again.
        """
        wanted = list(references)
        began = beat = time.monotonic()
        while True:
            ready, _ = ray.wait(wanted, num_returns=1, timeout=0)
            if ready:
                return ready[0], self._value(ready[0], what)
            beat = self._turn(wanted, began, beat, what)

    def hand_out(
        self, tasks: Iterable[Task], workers: Iterable[Worker], ask: Callable[[Worker, Task], Any], what: str
    ) -> Iterator[tuple[Task, Any]]:
        """Ask the workers to do all tasks, each the next one when it has done one; (task, answer) as they are done.

        `ask` returns a reference. Raises what `first` raises.
        """
        waiting, free = deque(tasks), deque(workers)
        busy: dict[Any, tuple[Worker, Task]] = {}
        while waiting or busy:
            while waiting and free:
                worker, task = free.popleft(), waiting.popleft()
                busy[ask(worker, task)] = worker, task
            reference, answer = self.first(busy, what)
            worker, task = busy.pop(reference)
            free.append(worker)
            yield task, answer

    def _turn(self, wanted: Sequence[Any], began: float, beat: float, what: str) -> float:
        """Wait a while for any reference, serve what is ready of the later ones, look at the nodes; the last beat."""
        ready, _ = ray.wait([*wanted, *self._later], num_returns=1, timeout=LOOK_EVERY)
        for reference in ready:
            if reference in self._later:
                then, what_for = self._later.pop(reference)
                then(self._value(reference, what_for))
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY:
            self._looked = now
            self._look()
        if now - beat >= HEARTBEAT:
            self.say(f"still {what}, {now - began:.0f} s")
            return now
        return beat

    def _look(self) -> None:
        lost = set(self._nodes.values()) - {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if lost:
            raise Lost(f"{len(lost)} of the nodes in use {'is' if len(lost) == 1 else 'are'} gone")

    def _value(self, reference: Any, what: str) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause: BaseException | None = error
            while isinstance(cause, RayTaskError):
                cause = cause.cause
            if isinstance(cause, MergeError):
                raise cause from error
            if isinstance(cause, RayError):
                # A trainer that lost a shard, or a target.
                self._judge(cause, what)
            raise RunError(
                f"an actor failed while {what}: {type(cause).__name__}: {cause}", do="--debug shows where"
            ) from error
        except RayError as error:
            self._judge(error, what)

    def _judge(self, error: RayError, what: str) -> NoReturn:
        """Whether a failure of Ray's is a loss, or the end."""
        if isinstance(error, ObjectLostError):
            raise Lost(f"what an actor had computed is gone ({type(error).__name__})") from error
        if isinstance(error, NodeDiedError | ActorUnschedulableError):
            raise Lost(f"an actor's node is gone ({type(error).__name__})") from error
        if isinstance(error, OutOfDiskError):
            raise RunError(
                f"the disk to which Ray's object store spills is full, while {what}",
                do="free some room, or start Ray with another --object-spilling-directory or a larger "
                "--object-store-memory; the same command goes on from here",
            ) from error
        if isinstance(error, OutOfMemoryError):
            raise RunError(
                f"a node ran out of memory while {what}, and again when the actor was started anew",
                do="`plan` shows what each process takes; the same command goes on from here",
            ) from error
        if isinstance(error, RayActorError):
            # A death is known a little sooner than that of the node that caused it.
            time.sleep(LOOK_EVERY)
            self._look()
            raise RunError(f"an actor died while {what}, and again when started anew: {error}") from error
        raise RunError(f"Ray failed while {what}: {type(error).__name__}: {error}") from error


def until_done(attempt: Callable[[], Result], standing: Callable[[], object], say: Callable[[str], None]) -> Result:
    """What `attempt` returns, made again after each loss; `standing` tells how far the run has come, by its state.

    Raises:
        RunError: so many attempts in a row were lost without getting any further.
    """
    tries, stood = 0, standing()
    while True:
        try:
            return attempt()
        except Lost as loss:
            before, stood = stood, standing()
            tries = tries + 1 if stood == before else 1
            if tries >= TRIES:
                raise RunError(f"{TRIES} tries in a row came no further: {loss}") from loss
            say(f"{loss}; placing everything anew, and going on from what is stored")
