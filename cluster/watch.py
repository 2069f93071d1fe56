"""Waiting for results of actors while the cluster is watched for lost nodes, and the actors for results.

Ray's failures become the project's errors, or `Lost` if the run can resume from its stored state.
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
    RuntimeEnvSetupError,
)

from engine.errors import ClusterError, MergeError, RunError
from engine.untrusted import SHOWN, shown

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


def no_environment(error: RuntimeEnvSetupError) -> ClusterError:
    """Return the error for a runtime environment that Ray cannot build."""
    return ClusterError(
        f"Ray cannot build a runtime environment: {shown(' '.join(str(error).split()), 4 * SHOWN)}",
        "the cluster",
        do="correct the runtime environment of the job, if this is one; otherwise unset RAY_RUNTIME_ENV_HOOK and "
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV, which make Ray build one",
    )


class Lost(Exception):
    """A node or an object was lost. The run must place its actors again and resume from its stored state.

    `do` is the advice for a user if this repeats.
    """

    do = ""


class Hung(Lost):
    """No actor has returned a result for longer than a healthy one takes."""

    do = "raise `cluster.hang`, if the machines are only slow; then run the same command to resume"


class Watch:
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
            ready, _ = ray.wait(wanted, num_returns=1, timeout=0)
            if ready:
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
        ready, _ = ray.wait([*wanted, *self._later], num_returns=1, timeout=LOOK_EVERY)
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

    def _unresponsive(self) -> list[str]:
        """Return the names and nodes of the actors that do not answer: those that hang, and those that wait for them.

        A trainer waits for the shards, so it is listed after them.
        """
        unseated = [actor for _, _, actor in self._later.values()]
        calls = {actor.__ray_ready__.remote(): actor for actor in self._actors if actor not in unseated}
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER) if calls else ([], [])
        addresses = {node["NodeID"]: node.get("NodeManagerAddress", node["NodeID"]) for node in ray.nodes()}
        silent = [self._actors[actor] for call, actor in calls.items() if call not in answered]
        return [f"{name} on node {addresses.get(node, node)}" for node, name in silent]

    def _look(self) -> None:
        lost = {node for node, _ in self._actors.values()} - {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if lost:
            raise Lost(f"{len(lost)} of the nodes in use {'was' if len(lost) == 1 else 'were'} lost")

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
                # The trainer lost a shard or a target.
                self._judge(cause, what)
            raise RunError(
                f"an actor failed while {what}: {type(cause).__name__}: {cause}",
                do="run with --debug to see where",
            ) from error
        except RayError as error:
            self._judge(error, what)

    def _judge(self, error: RayError, what: str) -> NoReturn:
        """Raise Lost if the run can resume after a failure of Ray, else ClusterError or RunError."""
        if isinstance(error, ObjectLostError):
            raise Lost(f"a result of an actor was lost ({type(error).__name__})") from error
        if isinstance(error, NodeDiedError | ActorUnschedulableError):
            raise Lost(f"the node of an actor was lost ({type(error).__name__})") from error
        if isinstance(error, OutOfDiskError):
            raise RunError(
                f"the disk to which Ray's object store spills is full while {what}",
                do="free disk space, or start Ray with another --object-spilling-directory or a larger "
                "--object-store-memory; then run the same command to resume",
            ) from error
        if isinstance(error, OutOfMemoryError):
            raise RunError(
                f"a node ran out of memory while {what}, and again after the actor was restarted",
                do="see `plan` for the memory per process; run the same command on larger nodes to resume",
            ) from error
        if isinstance(error, RuntimeEnvSetupError):
            raise no_environment(error) from error
        if isinstance(error, RayActorError):
            # Ray reports the death of an actor a little earlier than that of its node.
            time.sleep(LOOK_EVERY)
            self._look()
            raise RunError(
                f"an actor died while {what}, and again after restarts: {error}",
                do="run with --debug to see what the actor printed at its end, such as an error of its GPU",
            ) from error
        raise RunError(f"Ray failed while {what}: {type(error).__name__}: {error}") from error


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
