"""Resources of this machine that this process may use: CPUs, memory and GPUs, within the limits of a container."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_NOFILE, RLIMIT_NPROC, getrlimit

from engine.errors import MergeError

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
DEVICES = Path("/dev")


def usable_cpus(groups: Path = GROUPS, mount: Path = MOUNT) -> int:
    """Return the number of CPUs that this process may run on, at least 1.

    A quota of CPU time (`cpu.max` of cgroups, `cpu.cfs_quota_us` of their first version) counts as whole CPUs: with
    more threads than that, all of them would stop for a part of each period.

    Args:
        groups: The file that lists the control groups of this process.
        mount: The folder of the control groups.
    """
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _folders("cpu", groups, mount):
        second, first = folder / "cpu.max", (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
        numbers = _numbers(second) or sum(map(_numbers, first), ())
        if len(numbers) == 2 and min(numbers) > 0:
            most = min(most, numbers[0] // numbers[1])
    return max(1, most)


@cache
def processor() -> str:
    """Return the model of this machine's processor, on which the last bits of a sum may depend."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
        if models:
            return ", ".join(sorted(models))
    return platform.machine()


def usable_memory(groups: Path = GROUPS, mount: Path = MOUNT) -> int:
    """Return the bytes of memory that this process may use: those of the machine, or the limit of its control groups.

    For the arguments see `usable_cpus`.
    """
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _folders("memory", groups, mount):
        for name in ("memory.max", "memory.limit_in_bytes"):
            most = min([most, *(limit for limit in _numbers(folder / name) if limit > 0)])
    return most


def usable_gpus(devices: Path = DEVICES) -> int:
    """Return the number of NVIDIA GPUs, or MIG slices of them, that this process may use.

    Those of `devices`, the folder of device files, unless CUDA_VISIBLE_DEVICES lists fewer, or slices.
    """
    there = len([path for path in devices.glob("nvidia*") if path.name[6:].isdecimal()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not there:
        return there
    listed = [entry.strip() for entry in visible.split(",")]
    if listed[0].startswith("MIG-"):
        return len(listed)
    # CUDA stops at the first entry that names no GPU, such as -1.
    valid = [entry.startswith("GPU-") or (entry.isdecimal() and int(entry) < there) for entry in listed]
    return valid.index(False) if False in valid else len(valid)


def check_home(error_type: type[MergeError], *others: str) -> None:
    """Check that this user has a home folder: HOME is set, or the user has a name.

    Args:
        error_type: The class of the error to raise.
        others: Environment variables of which one suffices.

    Raises:
        MergeError: (`error_type`) there is no home folder.
    """
    if any(os.environ.get(name) for name in others):
        return
    try:
        Path.home()
    except RuntimeError as error:
        raise error_type(
            f"the user {os.getuid()} has no name and no home folder",
            "HOME",
            do=f"set {' or '.join(('HOME', *others))} to a folder that this user can write to",
        ) from error


def limits() -> str:
    """Return the finite limits of this process that can keep a program from starting, for a message; '' if none is."""
    known = {
        "open files": RLIMIT_NOFILE,
        "processes": RLIMIT_NPROC,
        "address space": RLIMIT_AS,
        "file size": RLIMIT_FSIZE,
    }
    most = {name: getrlimit(kind)[1] for name, kind in known.items()}
    return ", ".join(f"{name} {value:,}" for name, value in most.items() if value != RLIM_INFINITY)


def _folders(controller: str, groups: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, and of all groups around them.

    In a container, the path of a group may be the one outside; then its limits are those of the mounted folder itself.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = mount / controllers if controllers else mount
        if controllers and not root.is_dir():
            root = mount / controller
        group = root / path.strip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _numbers(path: Path) -> tuple[int, ...]:
    """Return the whole numbers in a file of a control group; none for `max`, and if there is no such file."""
    try:
        return tuple(map(int, path.read_text(encoding="ascii").split()))
    except (OSError, ValueError):
        return ()
