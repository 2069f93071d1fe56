"""Advice about the start of Ray, and the wait for its resources, is right: followed, Ray starts."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from advice import Advice, found, refusal
from conftest import plan_of
from ray._private.node import Node as RayNode
from ray._raylet import AuthenticationTokenLoader
from ray.exceptions import RuntimeEnvSetupError

import cli
import cluster.session
from cluster.placement import Devices, lay_out
from cluster.seats import Node
from cluster.session import connect, reserved
from engine.checkpoints.find import find_model
from engine.errors import MergeError
from engine.storage.cache import cache_folder

ADVICE = Advice(
    __name__,
    elsewhere={"{TOKEN}": "test_job.py, whose drivers all connect with the two variables, and one without"},
)


def test_every_advice_is_followed_or_has_a_reason() -> None:
    ADVICE.check()


@ADVICE.followed("this process is connected to a Ray already")
def test_a_process_that_is_connected_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = [True]
    monkeypatch.setattr(ray, "is_initialized", lambda: connected[0])
    monkeypatch.setattr(ray, "shutdown", lambda: connected.clear())

    def join(address: str | None) -> bool:
        with connect(address):
            return bool(connected)

    error = refusal(lambda: join("127.0.0.1:6379"))
    found(r"leave out the address .*ray\.shutdown\(\)", error)
    assert join(None) and connected, "it stays connected"


# The start of Ray. All of it is real, up to the point where its processes start.


class Started(BaseException):
    """Raised in place of the start of Ray's processes."""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder with a short path, in which Ray gets as far as the start of its processes."""

    def start(node: RayNode) -> None:
        raise Started

    monkeypatch.setattr(RayNode, "start_head_processes", start)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that what Ray sets is undone
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder:
        monkeypatch.setenv("HOME", folder)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        AuthenticationTokenLoader.instance().reset_cache()
        yield Path(folder)
    AuthenticationTokenLoader.instance().reset_cache()


def starts() -> None:
    with pytest.raises(Started), connect(None):
        pass


def not_started(address: str | None = None) -> MergeError:
    return refusal(lambda: connect(address).__enter__())


@ADVICE.followed("has no name and no home folder")
@pytest.mark.parametrize(
    "call",
    [cache_folder, lambda: find_model("owner/name", Path("/")), lambda: connect(None).__enter__()],
    ids=["cache", "hub", "Ray"],
)
def test_a_user_without_a_home_sets_a_variable(
    monkeypatch: pytest.MonkeyPatch, home: Path, call: Callable[[], object]
) -> None:
    def nameless(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nameless)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(home))
    for name in ("HOME", "HF_HOME", "EXPERT_MERGING_CACHE"):
        monkeypatch.delenv(name, raising=False)
    error = refusal(call)
    for name in found("set (.+) to a folder", error)[1].split(" or "):
        with monkeypatch.context() as patch, suppress(Started):
            patch.setenv(name, str(home))
            call()


@ADVICE.followed("where: {str(error.filename or _temporary())}")
@pytest.mark.parametrize("variable", ["HOME", "RAY_TMPDIR"])
def test_folders_of_ray_that_cannot_be_written_are_set(
    monkeypatch: pytest.MonkeyPatch, home: Path, variable: str
) -> None:
    monkeypatch.setenv(variable, "/proc/none")
    error = not_started()
    assert error.where.startswith("/proc/none")
    for name in found("set (.+) to folders", error)[1].split(" and "):
        monkeypatch.setenv(name, str(home))
    starts()


def test_a_folder_of_ray_with_a_long_path_is_set(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / ("x" * 100)).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(home / ("x" * 100)))
    advice = found(r"set (\w+) to an existing folder with a path of at most (\d+) characters", not_started())
    folder = home / ("x" * (int(advice[2]) - len(str(home)) - 1))
    folder.mkdir()
    monkeypatch.setenv(advice[1], str(folder))
    starts()
    (session,) = (folder / "ray").glob(f"session_*_{os.getpid()}")
    longest = f"{session}/sockets/plasma_store".replace(str(os.getpid()), "4194304")
    assert len(longest) <= 107, "also with the largest number of a process"


def test_a_folder_of_ray_on_a_full_disk_is_set(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / "full").mkdir()
    real = ray.init

    def init(**options: Any) -> None:
        if os.environ["RAY_TMPDIR"] == str(home / "full"):
            raise OSError(errno.ENOSPC, "No space left on device", os.environ["RAY_TMPDIR"])
        real(**options)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_TMPDIR", str(home / "full"))
    monkeypatch.setenv(found(r"set (\w+) to a folder on another disk", not_started())[1], str(home))
    starts()


@ADVICE.followed("what: Ray does not start: {what}")
def test_the_logs_of_ray_are_where_the_advice_says(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def fails(node: RayNode) -> None:
        raise Exception("the node timed out")

    monkeypatch.setattr(RayNode, "start_head_processes", fails)
    for name in ("RAY_TMPDIR", "TMPDIR"):
        logs = Path(found("see its logs in (.+?);", not_started())[1])
        assert logs.is_relative_to(home) and logs.is_dir(), name
        shutil.rmtree(home / "ray")
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setenv("TMPDIR", str(home))


@ADVICE.followed("a process may open {files} files")
def test_a_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    limit = 64
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    limit = int(found(r"nofile=(\d+)", not_started())[1])
    starts()


@ADVICE.followed("Ray cannot write to the shared memory")
@pytest.mark.slow
def test_a_shared_memory_is_mounted() -> None:
    """In a mount namespace of its own, whose shared memory is read-only at first."""
    code = """
import re, subprocess
from pathlib import Path
from cluster.session import _check_machine
from engine.errors import ClusterError
try:
    _check_machine()
except ClusterError as error:
    subprocess.run(re.search("as root: (.+)", error.do)[1].split(), check=True)
    _check_machine()
    Path("/dev/shm/file").write_text("written")
    print("followed")
"""
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", 'mount -t tmpfs -o ro t /dev/shm && exec "$@"']
    command += ["bash", sys.executable, "-c", code]
    root = Path(cli.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "followed\n", done.stderr


@ADVICE.followed("check the head's address")
def test_the_address_of_the_head_is_corrected(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        right = f"127.0.0.1:{head.getsockname()[1]}"
        error = not_started(right)  # nothing listens there yet
        assert error.where == right and "address" in error.do
        head.listen()
        monkeypatch.setattr(ray, "init", lambda **options: None)
        with connect(right):
            pass


def test_what_makes_ray_build_an_environment_is_unset(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def hook(environment: object) -> None:
        raise RuntimeEnvSetupError("no pip")

    monkeypatch.setattr(cluster.session, "hook", hook, raising=False)
    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "cluster.session.hook")
    for name in re.findall(r"RAY_\w+", not_started().do):
        monkeypatch.delenv(name, raising=False)
    starts()


# Resources

MANY = "cluster.shards=8"


class Group:
    """A placement group that is there at once if its bundles fit the free resources, or never."""

    def __init__(self, bundles: Sequence[dict[str, float]], free: dict[str, float]) -> None:
        self._fits = all(sum(bundle.get(kind, 0) for bundle in bundles) <= free[kind] for kind in free)

    def wait(self, seconds: float) -> bool:
        return self._fits


@ADVICE.followed("the resources did not become free")
@pytest.mark.parametrize(
    ("free", "named", "follow"),
    [
        ({"CPU": 3.0, "GPU": 2.0}, "`(cluster.shards)`", lambda keys: [f"{keys[1]}=1"]),
        (
            {"CPU": 64.0, "GPU": 1.0},
            "(num_gpus) of `(.+?)` or `(.+?)`",
            lambda keys: [MANY, f"{keys[2]}.{keys[1]}=0.5", f"{keys[3]}.{keys[1]}=0.5"],
        ),
    ],
    ids=["CPUs", "GPUs"],
)
def test_less_is_requested_or_resources_become_free(
    monkeypatch: pytest.MonkeyPatch,
    llama_merge: Path,
    free: dict[str, float],
    named: str,
    follow: Callable[[re.Match[str]], list[str]],
) -> None:
    nodes = [Node(64, 2, id="n0")]
    monkeypatch.setattr(cluster.session, "placement_group", lambda bundles, **options: Group(bundles, free))
    monkeypatch.setattr(cluster.session, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(cluster.session, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: free)

    def reserve(*overrides: str) -> None:
        plan = plan_of(llama_merge, *overrides)
        with reserved(lay_out(nodes, plan, Devices.of(nodes, plan.config)).reserved, 0, print):
            pass

    error = refusal(lambda: reserve(MANY))
    reserve(*follow(found(named, error)))
    assert error.do.startswith("free resources, add nodes")
    free = {"CPU": 64.0, "GPU": 2.0}
    reserve(MANY)
