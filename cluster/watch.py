"""Waiting for results of actors while their machines are watched for losses, and the actors for results.

How a result is awaited and fetched is that of the place where the actors run: `cluster.ray_watch`, `cluster.processes`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from engine.errors import RunError

# Seconds between two lines while nothing arrives.
HEARTBEAT = 30.0
# Seconds between two checks of the nodes.
LOOK_EVERY = 1.0
# Seconds of silence that one check can add. More has passed if the driver itself was stopped or starved.
MOST_SILENCE = 10.0
# Seconds in which an actor that does not hang answers a call.
ANSWER = 5.0
# Attempts in a row that may be lost without progress before the run fails.
TRIES = 3
Result = TypeVar("Result")
Task = TypeVar("Task")
Worker = TypeVar("Worker")


class Lost(Exception):
    """A node or an object was lost. The run must place its actors again and resume from its stored state.

    `do` is the advice for a user if this repeats.
    """

    do = ""


class Hung(Lost):
    """No actor has returned a result for longer than a healthy one takes."""

    do = "raise `cluster.hang`, if the machines are only slow; then run the same command to resume"


class Watch(ABC):
    """Waits for references. During every wait, the callbacks of references given to `later` are called.

    Results are the heartbeat of the actors. If none arrives for `patience` seconds of waiting, an actor hangs: it was
    stopped, or waits for a lock or for storage that does not answer. One actor that hangs silences the others in time,
    because their work ends or needs its result.

    Attributes:
        say: Prints a line.
        patience: Seconds without any result after which a wait raises `Hung`. None: no bound.
    """

    def __init__(self, say: Callable[[str], None], patience: float | None = None) -> None:
        self.say, self.patience = say, patience
        self._silent = 0.0
        # The node and the name of each actor.
        self._actors: dict[Any, tuple[str, str]] = {}
        self._later: dict[Any, tuple[Callable[[Any], None], str, Any]] = {}
        self._looked = 0.0

    def on(self, actor: Any, node: str, name: str) -> None:
        """Watch the node of an actor, which messages call `name`."""
        self._actors[actor] = node, name

    def gone(self, actor: Any) -> None:
        """Stop watching the node of a dismissed actor."""
        self._actors.pop(actor, None)

    def later(self, reference: Any, then: Callable[[Any], None], what: str, unseated: Any = None) -> None:
        """Call `then` with the value of the reference, during the first wait in which it is ready.

        `unseated`: its actor, if that still waits for a seat. Such an actor may be silent forever.
        """
        self._later[reference] = then, what, unseated

    def forget(self, reference: Any) -> None:
        """Drop a reference that was given to `later`."""
        self._later.pop(reference)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Call the callbacks of references given to `later` until `done` returns True."""
        began = beat = time.monotonic()
        self._silent = 0.0
        while not done():
            assert self._later, f"nothing to wait for: {what}"
            beat = self._turn([], began, beat, what)

    def answer(self, reference: Any, what: str) -> Any:
        """Wait for one reference and return its value; see `first`."""
        return self.first([reference], what)[1]

    def first(self, references: Iterable[Any], what: str) -> tuple[Any, Any]:
        """Wait until a reference is ready, and return it with its value. A line every 30 seconds says what is awaited.

        Raises:
            MergeError: the error that an actor raised.
            ClusterError: Ray cannot build the runtime environment of an actor.
            RunError: an actor died more often than Ray restarts it, or failed unexpectedly.
            Lost: a watched node was lost, or an object that no actor can compute again, or an actor hangs.
        """
        wanted = list(references)
        self._silent = 0.0
        began = beat = time.monotonic()
        while True:
            if ready := self._ready(wanted, 0):
                return ready[0], self._value(ready[0], what)
            beat = self._turn(wanted, began, beat, what)

    def hand_out(
        self, tasks: Iterable[Task], workers: Iterable[Worker], ask: Callable[[Worker, Task], Any], what: str
    ) -> Iterator[tuple[Task, Any]]:
        """Distribute the tasks over the workers as they become free, and yield (task, value) as tasks complete.

        `ask` calls a worker with a task and returns the reference. Raises the errors of `first`.
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
        """Wait up to LOOK_EVERY, call callbacks, check nodes and silence; return the time of the last line."""
        asked = time.monotonic()
        ready = self._ready([*wanted, *self._later], LOOK_EVERY)
        now = time.monotonic()
        self._listen(bool(ready), now - asked, bool(wanted), what)
        for reference in ready:
            if reference in self._later:
                then, what_for, _ = self._later.pop(reference)
                then(self._value(reference, what_for))
        if now - self._looked >= LOOK_EVERY:
            self._looked = now
            self._look()
        if now - beat >= HEARTBEAT:
            self.say(f"still {what}, {now - began:.0f} s")
            return now
        return beat

    def _listen(self, heard: bool, waited: float, wanted: bool, what: str) -> None:
        """Add up the silence, and raise Hung if it is longer than the actors of this wait can need."""
        if heard or not (wanted or any(unseated is None for _, _, unseated in self._later.values())):
            self._silent = 0.0
            return
        self._silent += min(waited, MOST_SILENCE)
        if self.patience is not None and self._silent > self.patience:
            silent = ", ".join(self._unresponsive())
            told = f"; no answer from {silent}" if silent else ""
            raise Hung(f"an actor hangs: no result for {self._silent:.0f} s while {what}{told}")

    @abstractmethod
    def _ready(self, references: Sequence[Any], timeout: float) -> list[Any]:
        """Wait up to `timeout` seconds for one of the references, and return it in a list; an empty list if none is."""

    @abstractmethod
    def _value(self, reference: Any, what: str) -> Any:
        """Return the value of a reference that is ready, or raise its error; see `first`."""

    @abstractmethod
    def _look(self) -> None:
        """Raise Lost if a machine with an actor was lost."""

    @abstractmethod
    def _unresponsive(self) -> list[str]:
        """Return the names and places of the actors that do not answer: those that hang, and those that wait for them.

        A trainer waits for the shards, so it is listed after them.
        """


def until_done(attempt: Callable[[], Result], marker: Callable[[], object], say: Callable[[str], None]) -> Result:
    """Call `attempt` until it is not lost, and return its result.

    Args:
        attempt: Called again after each `Lost`.
        marker: Returns a value that changes whenever the run makes progress.
        say: Prints a line.

    Raises:
        RunError: TRIES attempts in a row were lost without progress.
    """
    tries, reached = 0, marker()
    while True:
        try:
            return attempt()
        except Lost as loss:
            before, reached = reached, marker()
            tries = tries + 1 if reached == before else 1
            if tries >= TRIES:
                raise RunError(f"{TRIES} attempts in a row made no progress: {loss}", do=loss.do) from loss
            say(f"{loss}; placing all actors again and resuming from the stored state")
