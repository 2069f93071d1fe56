"""The connection to Ray, the nodes of the cluster, and reserved seats on them."""

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
from ray.exceptions import AuthenticationError, RuntimeEnvSetupError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.placement import Node, Seat
from cluster.watch import Lost, no_environment
from engine.errors import ClusterError
from engine.machine import check_home

PACKAGES = [str(Path(__file__).resolve().parent.parent / name) for name in ("engine", "actors", "cluster")]
# By default glibc keeps large freed buffers, and the memory of a trainer seems to grow. With these settings it returns
# buffers of 4 MiB and more, and keeps at most 128 MiB of smaller ones. A lower threshold costs time, because memory is
# requested again at every operation: measured, a seventh of a step at 2 MiB, nothing noticeable at 4 MiB.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "TOKENIZERS_PARALLELISM": "false",
}
TOKEN = "check that the head is running; if it requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too"
SHORT = "set RAY_TMPDIR to an existing folder with a path of at most 35 characters"
WRITABLE = "give this user access to it, or set HOME and RAY_TMPDIR to folders that this user can write to"
SAY_EVERY = 5.0
KNOCK_SECONDS = 10.0
Found = TypeVar("Found")


@contextmanager
def connect(address: str | None, debug: bool = False) -> Iterator[None]:
    """Connect to the cluster at `address` or RAY_ADDRESS (set in a submitted job), else start Ray on this machine.

    Raises:
        ClusterError: no cluster answers at the address, or Ray does not start.
    """
    check_home(ClusterError)
    address = address or os.environ.get("RAY_ADDRESS")
    on_stop = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any]
    if address:
        _check_port(address)
        environment: dict[str, Any] = {"env_vars": ENVIRONMENT}
        if not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            # A job ships its working directory; a driver outside a job must ship the packages itself.
            environment["py_modules"] = PACKAGES
        options = {"address": address, "runtime_env": environment}
    else:
        # Workers of a local Ray inherit the environment of this process.
        os.environ.update(ENVIRONMENT)
        options = {"address": "local", "include_dashboard": False}
    # Ray would handle a SIGTERM that arrives while it starts. The processes of a local Ray would inherit the block.
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
    except RuntimeEnvSetupError as error:
        raise no_environment(error) from error
    except OSError as error:
        # Such as a folder whose name is too long for the sockets in it, or to which this user cannot write.
        temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        do = SHORT if "AF_UNIX" in str(error) else WRITABLE
        raise ClusterError(f"Ray does not start: {error}", str(error.filename or temporary), do=do) from error
    finally:
        # Ray sets a SIGTERM handler that ends the driver at once. Restore ours, which raises KeyboardInterrupt.
        signal.signal(signal.SIGTERM, on_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    try:
        yield
    finally:
        ray.shutdown()


def _check_port(address: str | None) -> None:
    """Fail at once if nothing listens at host:port. Ray itself would retry for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(
                f"no Ray cluster answers: {error}", str(address), do="check the head's address"
            ) from error


def nodes() -> list[Node]:
    """Return the nodes that are alive, with all of their resources, in use or not."""
    return [
        Node(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            # Memory that Ray reserves for its object store serves as page cache until it is used.
            node["Resources"].get("memory", 0.0) + node["Resources"].get("object_store_memory", 0.0),
            node["NodeID"],
            node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def await_layout(find: Callable[[], Found], wait: float, say: Callable[[str], None]) -> Found:
    """Call `find` until it raises no ClusterError, and return its result. In the meantime nodes may join.

    Raises:
        ClusterError: the last error of `find`, after `wait` seconds.
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
    """Reserve all of the seats while the context lasts.

    Raises:
        ClusterError: other jobs occupy the resources, and they do not become free within `wait` seconds.
        Lost: the node of a seat was lost while waiting.
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
                raise Lost("a node was lost before its actors started")
            _say_or_stop(seats, time.monotonic() - began, wait, say)
        yield group
    finally:
        remove_placement_group(group)


def _say_or_stop(seats: Sequence[Seat], waited: float, wait: float, say: Callable[[str], None]) -> None:
    needed = {kind: sum(seat.bundle.get(kind, 0) for seat in seats) for kind in ("CPU", "GPU")}
    free = ray.available_resources()
    parts = [f"{needed[kind]:g} {kind}s ({free.get(kind, 0):g} free)" for kind in needed if needed[kind]]
    request = f"{' and '.join(parts)}, in {len(seats)} seats"
    if waited >= wait:
        raise ClusterError(
            f"the resources did not become free within {wait:g} seconds",
            "the cluster",
            request,
            "free resources, add nodes, or lower num_gpus or shards in the config's `cluster`",
        )
    say(f"waiting for resources ({waited:.0f} of {wait:g} s): {request}")
