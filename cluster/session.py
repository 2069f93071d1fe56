"""A connection to Ray, the nodes that it has, and seats reserved on them. Knows no merging."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.placement import Node, Seat
from cluster.watch import Lost
from engine.errors import ClusterError

PACKAGES = [str(Path(__file__).resolve().parent.parent / name) for name in ("engine", "actors", "cluster")]


# glibc would keep large buffers that were freed for itself, and a trainer would seem to grow. Those below 4 MiB it may
# keep, 128 MiB at most: memory that is asked for anew at every operation costs a step a part of its time (a seventh at
# 2 MiB, nothing to be seen at 4, measured).
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "TOKENIZERS_PARALLELISM": "false",
}


TOKEN = "see that the head is up; if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here, too"


SAY_EVERY = 5.0


KNOCK_SECONDS = 10.0


Found = TypeVar("Found")


@contextmanager
def connect(address: str | None, debug: bool = False) -> Iterator[None]:
    """Use the cluster at `address` (or RAY_ADDRESS, which a submitted job has), else start Ray on this machine.

    Raises:
        ClusterError: there is no cluster at that address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    on_stop = signal.getsignal(signal.SIGTERM)
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
    # A stop in the middle of it would be Ray's to handle. A Ray of our own would give this on to its processes.
    blocked = {signal.SIGTERM} if address else set()
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        ray.init(
            log_to_driver=debug,
            logging_level="info" if debug else "error",
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise ClusterError(f"no Ray cluster answers: {error}", address or "this machine", do=TOKEN) from error
    finally:
        # Ray has set a handler of its own, which would end the driver at once: a stop must leave by our way out.
        signal.signal(signal.SIGTERM, on_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
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


def nodes() -> list[Node]:
    """The nodes that are alive, with all that they have, in use or not."""
    return [
        Node(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            # What Ray sets aside for its object store is page cache to us until it is used.
            node["Resources"].get("memory", 0.0) + node["Resources"].get("object_store_memory", 0.0),
            node["NodeID"],
            node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def await_layout(find: Callable[[], Found], wait: float, say: Callable[[str], None]) -> Found:
    """What `find` returns, as soon as it raises no ClusterError any more: nodes may join, or come again.

    Raises:
        ClusterError: its last one, after `wait` seconds.
    """
    began = time.monotonic()
    while True:
        try:
            return find()
        except ClusterError as error:
            waited = time.monotonic() - began
            if waited >= wait:
                raise
            say(f"waiting for nodes ({waited:.0f} of {wait:g} s): {error.what}")
            time.sleep(min(SAY_EVERY, max(0.1, wait - waited)))


@contextmanager
def reserved(seats: Sequence[Seat], wait: float, say: Callable[[str], None]) -> Iterator[PlacementGroup]:
    """Hold the seats while the context lasts, all of them or none.

    Raises:
        ClusterError: they are not to be had within `wait` seconds, as others have them.
        Lost: a node went meanwhile.
    """
    group = placement_group(
        [seat.bundle for seat in seats],
        strategy="PACK",
        bundle_label_selector=[{"ray.io/node-id": seat.node} for seat in seats],
    )
    try:
        began = time.monotonic()
        while not group.wait(min(SAY_EVERY, max(0.1, wait))):
            if not {seat.node for seat in seats} <= {node.id for node in nodes()}:
                raise Lost("a node went before it was used")
            _say_or_stop(seats, time.monotonic() - began, wait, say)
        yield group
    finally:
        remove_placement_group(group)


def _say_or_stop(seats: Sequence[Seat], waited: float, wait: float, say: Callable[[str], None]) -> None:
    asked = {kind: sum(seat.bundle.get(kind, 0) for seat in seats) for kind in ("CPU", "GPU")}
    free = ray.available_resources()
    parts = [f"{asked[kind]:g} {kind}s ({free.get(kind, 0):g} are free)" for kind in asked if asked[kind]]
    missing = f"asked for: {' and '.join(parts)}, in {len(seats)} parts"
    if waited >= wait:
        raise ClusterError(
            f"the resources were not to be had within {wait:g} seconds",
            "the cluster",
            missing,
            "free some, add nodes, or lower num_gpus or shards in the config's `cluster`",
        )
    say(f"waiting for resources ({waited:.0f} of {wait:g} s); {missing}")
