"""The limits of a container, as both versions of control groups state them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from errors import refused

import engine.machine
from cluster.session import connect
from engine.checkpoints.find import find_model
from engine.errors import CheckpointError, ClusterError, InputError
from engine.machine import check_home, usable_cpus, usable_gpus, usable_memory
from engine.planning.costs.scaling import Machines
from engine.storage.cache import cache_folder

WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
SECOND, FIRST = "0::/pod/box\n", "5:cpu,cpuacct:/pod/box\n4:memory:/pod/box\n"
UNLIMITED = 2**63 - 4096


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight CPUs, whatever the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("groups", "files", "cpus", "memory"),
    [
        (None, {}, 8, WHOLE),
        ("", {}, 8, WHOLE),
        ("nonsense\n\n:\n", {}, 8, WHOLE),
        (SECOND, {}, 8, WHOLE),
        (SECOND, {"pod/box/cpu.max": "max 100000\n", "pod/box/memory.max": "max\n"}, 8, WHOLE),
        (SECOND, {"pod/box/cpu.max": "200000 100000\n", "pod/box/memory.max": "1000000\n"}, 2, 1_000_000),
        (SECOND, {"pod/box/cpu.max": "250000 100000\n"}, 2, WHOLE),
        (SECOND, {"pod/box/cpu.max": "50000 100000\n"}, 1, WHOLE),
        (SECOND, {"pod/box/cpu.max": "6400000 100000\n", "memory.max": f"{2 * WHOLE}\n"}, 8, WHOLE),
        # A group around the process's own limits it too.
        (SECOND, {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "400000 100000", "pod/memory.max": "7"}, 3, 7),
        # In a container that sees its own group as the root.
        ("0::/\n", {"cpu.max": "400000 100000", "memory.max": "5000"}, 4, 5000),
        ("0::/\n", {"cpu.max": "", "memory.max": "\xff"}, 8, WHOLE),
        ("0::/\n", {"cpu.max": "4", "memory.max": "0"}, 8, WHOLE),
        (
            FIRST,
            {
                "cpu,cpuacct/pod/box/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000",
                "memory/pod/box/memory.limit_in_bytes": "9000",
                "memory/memory.limit_in_bytes": f"{UNLIMITED}",
            },
            3,
            9000,
        ),
        (
            FIRST,
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "12"},
            8,
            12,
        ),
    ],
)
def test_the_limits_of_control_groups(
    tmp_path: Path, groups: str | None, files: dict[str, str], cpus: int, memory: int
) -> None:
    listed, mount = tmp_path / "cgroup", tmp_path / "fs"
    if groups is not None:
        listed.write_text(groups)
    for name, content in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(content)
    assert usable_cpus(listed, mount) == cpus
    assert usable_memory(listed, mount) == memory


def test_a_plan_is_made_for_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.planning.costs.scaling.usable_memory", lambda: 3_000_000)
    monkeypatch.setattr("engine.planning.costs.scaling.usable_cpus", lambda: 3)
    assert (Machines.here().cpus, Machines.here().memory) == (3, 3_000_000)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nameless(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "HF_HOME", "EXPERT_MERGING_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nameless)
    with refused(InputError, where="HOME", do="EXPERT_MERGING_CACHE"):
        cache_folder()
    with refused(CheckpointError, where="HOME", do="HF_HOME"):
        find_model("owner/name", tmp_path)
    with refused(ClusterError, where="HOME", do="HOME"), connect(None):
        pass
    monkeypatch.setenv("EXPERT_MERGING_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("HOME", "/")
    check_home(InputError)


def test_a_temporary_folder_too_long_for_sockets_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with refused(ClusterError, where=str(long), do="RAY_TMPDIR", facts=["107"]), connect(None):
        pass


def test_a_home_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".ray"))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", denied)
    with refused(ClusterError, where=str(tmp_path / ".ray"), do="HOME"), connect(None):
        pass


def stands_in(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> None:
    """Let `connect` start a local Ray with these functions in place of Ray's."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, call in calls.items():
        monkeypatch.setattr(f"ray.{name}", call)


@pytest.mark.parametrize("error", [Exception("the node\ntimed out"), RuntimeError("no GCS\n\n.Please see x\n")])
def test_a_ray_that_does_not_start_is_reported_in_few_lines(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(**_: object) -> None:
        raise error

    stands_in(monkeypatch, init=fails)
    monkeypatch.setattr(engine.machine, "getrlimit", lambda _: (7, 10_240))
    facts = ["file size 10,240", str(error).split()[-1]]
    with refused(ClusterError, do="session_latest", facts=facts) as caught, connect(None):
        pass
    assert len(str(caught.value).splitlines()) == 2


def test_an_unknown_error_of_ray_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise KeyError("a defect")

    stands_in(monkeypatch, init=fails)
    with pytest.raises(KeyError), connect(None):
        pass


def test_too_few_open_files_for_ray_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in(monkeypatch, init=None)
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    with refused(ClusterError, do="--ulimit nofile=", facts=["64", "256"]), connect(None):
        pass


def test_a_shared_memory_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in(monkeypatch, init=None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with refused(ClusterError, where="/dev/shm"), connect(None):
        pass


@pytest.mark.parametrize(("free", "said"), [(64 << 20, True), (4 << 30, False)])
def test_a_small_shared_memory_is_mentioned(monkeypatch: pytest.MonkeyPatch, free: int, said: bool) -> None:
    lines: list[str] = []
    nodes = [{"Resources": {"object_store_memory": 2e9, "CPU": 2.0}}]
    stands_in(monkeypatch, init=lambda **_: None, shutdown=lambda: None, nodes=lambda: nodes)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with connect(None, say=lines.append):
        pass
    assert any("/dev/shm" in line for line in lines) == said


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, 4),
        ("0,1", 2),
        ("", 0),
        ("-1", 0),
        ("2, 3,7,0", 2),
        ("GPU-8a2c,GPU-11f0", 2),
        ("MIG-1,MIG-2,MIG-3,MIG-4,MIG-5", 5),
    ],
)
def test_gpus_that_are_hidden_do_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, gpus: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_gpus(tmp_path) == gpus


def test_a_machine_without_gpus_has_none_whatever_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert usable_gpus(tmp_path) == 0
