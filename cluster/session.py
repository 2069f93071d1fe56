"""A connection to Ray, resources reserved on it, and answers waited for with a word now and then.

Turns Ray's failures into the project's errors. Knows no merging.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.placement import Bundle, Node, fits, shortage
from engine.errors import ClusterError, MergeError, RunError

PACKAGES = [str(Path(__file__).resolve().parent.parent / name) for name in ("engine", "actors", "cluster")]
# glibc would keep large buffers that were freed for itself, and a trainer would seem to grow. Those below 4 MiB it may
# keep, 128 MiB at most: memory that is asked for anew at every operation costs a step a part of its time (a seventh at
# 2 MiB, nothing to be seen at 4, measured).
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "TOKENIZERS_PARALLELISM": "false",
}
SAY_EVERY = 5.0
HEARTBEAT = 30.0
KNOCK_SECONDS = 10.0


@contextmanager
def connect(address: str | None, debug: bool = False) -> Iterator[None]:
    """Use the cluster at `address` (or RAY_ADDRESS, which a submitted job has), else start Ray on this machine.

    Raises:
        ClusterError: there is no cluster at that address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any]
    if address:
        _knock(address)
        environment: dict[str, Any] = {"env_vars": ENVIRONMENT}
        if not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            # A job brings its working directory along; a driver outside of one has to.
            environment["py_modules"] = PACKAGES
        options = {"address": address, "runtime_env": environment}
    else:
        # Workers of a Ray of our own inherit this process's environment, and need no other.
        os.environ.update(ENVIRONMENT)
        options = {"address": "local", "include_dashboard": False}
    try:
        ray.init(
            log_to_driver=debug,
            logging_level="info" if debug else "error",
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster answers: {error}", address or "this machine") from error
    # Ray's own handler, set a moment ago, would end the driver at once: a stop must leave by our way out.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Fail at once where nothing listens at host:port: Ray itself would go on trying for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(
                f"no Ray cluster answers: {error}", str(address), do="check the head's address"
            ) from error


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def nodes() -> list[Node]:
    """The nodes that are alive, with all that they have, in use or not."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [
        Node(
            resources.get("CPU", 0.0),
            resources.get("GPU", 0.0),
            # What Ray sets aside for its object store is page cache to us until it is used.
            resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0),
        )
        for resources in alive
    ]


def home_of(bundle: Bundle) -> Bundle:
    """The bundle, and with it a token of one node that has all of it, which keeps whoever asks for it there."""
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and all(has.get(kind, 0) >= amount for kind, amount in bundle.items()):
            return bundle | {f"node:{node['NodeManagerAddress']}": 0.001}
    raise AssertionError("no node has all of it, though one was waited for")


def await_nodes(bundles: Sequence[Bundle], wait: float, say: Callable[[str], None]) -> None:
    """Return when the cluster has a node for each of the bundles, before anything is computed that would be lost.

    Raises:
        ClusterError: it has not within `wait` seconds.
    """
    began = time.monotonic()
    while not fits(nodes(), bundles):
        _say_or_stop(bundles, time.monotonic() - began, wait, say)
        time.sleep(min(SAY_EVERY, max(0.1, wait)))


@contextmanager
def reserved(bundles: Sequence[Bundle], wait: float, say: Callable[[str], None]) -> Iterator[PlacementGroup]:
    """Hold the bundles, spread over the nodes, while the context lasts.

    Raises:
        ClusterError: they are not to be had within `wait` seconds.
    """
    group = placement_group(list(bundles), strategy="SPREAD")
    try:
        began = time.monotonic()
        while not group.wait(min(SAY_EVERY, max(0.1, wait))):
            _say_or_stop(bundles, time.monotonic() - began, wait, say)
        yield group
    finally:
        remove_placement_group(group)


def _say_or_stop(bundles: Sequence[Bundle], waited: float, wait: float, say: Callable[[str], None]) -> None:
    if waited >= wait:
        raise ClusterError(
            f"the resources were not to be had within {wait:g} seconds",
            "the cluster",
            shortage(nodes(), bundles),
            "free some, add nodes, or lower num_gpus or shards in the config's `cluster`",
        )
    say(f"waiting for resources ({waited:.0f} of {wait:g} s); {shortage(nodes(), bundles)}")


def answer(reference: Any, say: Callable[[str], None], what: str) -> Any:
    """The value of one reference, with a line every half minute while it is not there; see `first_answer`."""
    return first_answer([reference], say, what)[1]


def first_answer(references: Sequence[Any], say: Callable[[str], None], what: str) -> tuple[Any, Any]:
    """The first of the references to be there, and its value.

    Raises:
        MergeError: one that an actor raised, as it was raised there.
        RunError: an actor died more often than it is started again, or failed in a way that we did not foresee.
    """
    began = time.monotonic()
    while True:
        ready, _ = ray.wait(list(references), num_returns=1, timeout=HEARTBEAT)
        if ready:
            return ready[0], _value(ready[0], what)
        say(f"still {what}, {time.monotonic() - began:.0f} s")


def _value(reference: Any, what: str) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause: BaseException | None = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, MergeError):
            raise cause from error
        raise RunError(
            f"an actor failed while {what}: {type(cause).__name__}: {cause}", do="--debug shows where"
        ) from error
    except (RayActorError, OutOfMemoryError) as error:
        raise RunError(f"an actor died while {what}, and again when started anew: {error}") from error
    except RayError as error:
        raise RunError(f"Ray failed while {what}: {error}") from error
