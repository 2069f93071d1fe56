"""The connection to Ray, the nodes of the cluster, and reserved seats on them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RuntimeEnvSetupError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.ray_log import ray_log
from cluster.ray_watch import no_environment
from cluster.seats import Node, Seat
from cluster.watch import Lost
from engine.errors import ClusterError
from engine.machine import check_home, limits

PACKAGES = [str(Path(__file__).resolve().parent.parent / name) for name in ("engine", "actors", "cluster")]
# By default glibc keeps large freed buffers, and the memory of a trainer seems to grow. With these settings it returns
# buffers of 4 MiB and more, and keeps at most 128 MiB of smaller ones. A lower threshold costs time, because memory is
# requested again at every operation: measured, a seventh of a step at 2 MiB, nothing noticeable at 4 MiB.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    # A thread of torch that waits for another spins this often, and then sleeps. By default it spins for milliseconds,
    # which takes the CPU from the thread that it waits for, if others compute on the machine, too: measured on two busy
    # CPUs, products of matrices took five times as long.
    "GOMP_SPINCOUNT": "1000",
    "TOKENIZERS_PARALLELISM": "false",
    # Hides the GPUs from actors that request none. A cluster that runs already need not heed it.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
TOKEN = "check that the head is running; if it requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too"
SHORT = "set RAY_TMPDIR to an existing folder with a path of at most 35 characters"
# Seen to suffice on two CPUs; with 64, Ray's own processes end without a message.
OPEN_FILES = 256
SHARED = Path("/dev/shm")
WRITABLE = "give this user access to it, or set HOME and RAY_TMPDIR to folders that this user can write to"
ROOM = "free disk space, or set RAY_TMPDIR to a folder on another disk"
SAY_EVERY = 5.0
KNOCK_SECONDS = 10.0


@contextmanager
def connect(
    address: str | None, debug: bool = False, log: Path | None = None, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Connect to the cluster at `address` or RAY_ADDRESS (set in a submitted job), else start Ray on this machine.

    A process that is connected already, such as that of a notebook, stays so: its Ray is used.

    Args:
        address: The address of a running cluster.
        debug: Ray and the actors print on the terminal; otherwise to the file `log`, if there is one.
        log: That file. What others print on the error output of this process is then given to `say`.
        say: Called with lines for the user.

    Raises:
        ClusterError: no cluster answers at the address, Ray does not start, or the process is connected and an address
            is given.
    """
    if ray.is_initialized():
        if address:
            do = "leave out the address to use the Ray that is connected, or call ray.shutdown() first"
            raise ClusterError("this process is connected to a Ray already", address, do=do)
        yield
        return
    check_home(ClusterError)
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any]
    if address:
        _check_port(address)
        environment: dict[str, Any] = {"env_vars": ENVIRONMENT}
        if not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            # A job ships its working directory; a driver outside a job must ship the packages itself.
            environment["py_modules"] = PACKAGES
        options = {"address": address, "runtime_env": environment}
    else:
        _check_machine()
        # Workers of a local Ray inherit the environment of this process.
        os.environ.update(ENVIRONMENT)
        options = {"address": "local", "include_dashboard": False}
    shown = debug or log is not None
    with nullcontext() if debug or log is None else ray_log(log, say):
        _start(options, address, "info" if shown else "error", shown)
        try:
            if not address:
                _say_if_slow(say)
            yield
        finally:
            ray.shutdown()


def _start(options: dict[str, Any], address: str | None, level: str, log_to_driver: bool) -> None:
    """Call `ray.init`; see `connect` for the errors."""
    on_stop = signal.getsignal(signal.SIGTERM)
    # Ray would handle a SIGTERM that arrives while it starts. The processes of a local Ray would inherit the block.
    blocked = {signal.SIGTERM} if address else set()
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        ray.init(log_to_driver=log_to_driver, logging_level=level, **options)
    except RuntimeEnvSetupError as error:
        raise no_environment(error) from error
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        raise _not_started(error, address) from error
    except Exception as error:
        # Ray raises a bare Exception if one of its processes ends at its start.
        if type(error) is not Exception:
            raise
        raise _not_started(error, address) from error
    finally:
        # In the main thread, Ray sets a SIGTERM handler that ends the driver at once. Restore the one that was set.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


def actor_options() -> dict[str, Any]:
    """Return the options that give an actor ENVIRONMENT, if the connected Ray, which others have started, does not."""
    given = os.environ | (ray.get_runtime_context().runtime_env.get("env_vars") or {})
    return {} if ENVIRONMENT.items() <= given.items() else {"runtime_env": {"env_vars": ENVIRONMENT}}


def _temporary() -> str:
    """Return the folder in which Ray keeps its files."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _check_machine() -> None:
    """Check what Ray needs to start on this machine, and without which it ends with no message that says so."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= files < OPEN_FILES:
        # The hard limit, to which Ray raises its own. Only another process can raise it.
        do = "raise the hard limit where this process starts, such as with --ulimit nofile=65536 of docker"
        raise ClusterError(f"a process may open {files} files", "this machine", f"at least {OPEN_FILES}", do)
    if sys.platform == "linux" and not (SHARED.is_dir() and os.access(SHARED, os.W_OK | os.X_OK)):
        do = "mount it so that this user can write to it, as root: mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
        raise ClusterError("Ray cannot write to the shared memory", str(SHARED), "a folder of type tmpfs", do)


def _say_if_slow(say: Callable[[str], None]) -> None:
    """Say that Ray's objects are not in shared memory, because that is too small. Ray says so in its logs alone."""
    store = sum(node["Resources"].get("object_store_memory", 0) for node in ray.nodes())
    if sys.platform == "linux" and (free := shutil.disk_usage(SHARED).free) < store:
        place = f"{_temporary()}, which may be slower"
        say(f"{SHARED} has {free / 1e9:.2f} GB free, so Ray keeps its objects in {place}")


def _not_started(error: Exception, address: str | None) -> ClusterError:
    """Return the error for an exception of `ray.init`."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        # Such as a folder whose name is too long for the sockets in it, or to which this user cannot write.
        do = SHORT if "AF_UNIX" in str(error) else ROOM if error.errno == errno.ENOSPC else WRITABLE
        return ClusterError(f"Ray does not start: {error}", str(error.filename or _temporary()), do=do)
    what = " ".join(str(error).split())
    if address:
        return ClusterError(f"no Ray cluster answers: {what}", address, do=TOKEN)
    do = f"see its logs in {_temporary()}/ray/session_latest/logs; check the free memory"
    do += f" and the limits of this process ({found}; ulimit -a)" if (found := limits()) else ""
    return ClusterError(f"Ray does not start: {what}", "this machine", do=do)


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
            "free resources, add nodes, or lower `cluster.shards` or num_gpus of `cluster.trainer` or `cluster.expert`",
        )
    say(f"waiting for resources ({waited:.0f} of {wait:g} s): {request}")
