"""Waiting for results of actors on Ray: its failures become the project's errors, or `Lost` if the run can resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ray
from ray._private.state import actors
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

from cluster.watch import ANSWER, LOOK_EVERY, Lost, Watch
from engine.errors import ClusterError, MergeError, RunError
from engine.untrusted import SHOWN, shown


def no_environment(error: RuntimeEnvSetupError) -> ClusterError:
    """Return the error for a runtime environment that Ray cannot build."""
    return ClusterError(
        f"Ray cannot build a runtime environment: {shown(' '.join(str(error).split()), 4 * SHOWN)}",
        "the cluster",
        do="correct the runtime environment of the job, if this is one; otherwise unset RAY_RUNTIME_ENV_HOOK and "
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV, which make Ray build one",
    )


def restarts() -> dict[str, int]:
    """Return how often Ray has started an actor of this job again, by the ids of those that have died."""
    # Not part of Ray's public interface, which needs the dashboard for this.
    table = actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))
    return {key: actor["NumRestarts"] for key, actor in table.items() if actor["NumRestarts"]}


class RayWatch(Watch):
    """The watch of actors on the connected Ray."""

    def __init__(self, say: Callable[[str], None], patience: float | None = None) -> None:
        super().__init__(say, patience)
        self._restarts: dict[str, int] = {}

    def gone(self, actor: Any) -> None:
        """See `Watch`. What has happened to the actor since the last look is said first."""
        self._say_restarts()
        super().gone(actor)

    def _ready(self, references: Sequence[Any], timeout: float) -> list[Any]:
        ready: list[Any] = ray.wait(list(references), num_returns=1, timeout=timeout)[0]
        return ready

    def _unresponsive(self) -> list[str]:
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
        self._say_restarts()

    def _say_restarts(self) -> None:
        """Say which actors have died and are started again."""
        found = restarts() if self._actors else {}
        for actor, (_, name) in self._actors.items() if found else ():
            key = actor._actor_id.hex()
            if found.get(key, 0) > self._restarts.get(key, 0):
                self._restarts[key] = found[key]
                self.say(f"{name} died and is started again; its work is repeated")

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
