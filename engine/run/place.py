"""Checks of `--out` from its name and the plan alone, before any work: can the folder be made, and is it no input.

Reads no file. `plan` and `merge` make the same checks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from engine.errors import OutputError
from engine.planning.plan import ModelPlan, Plan
from engine.run.ownership import MARKER
from engine.storage.address import Address
from engine.storage.local_folder import check_creatable, check_writable
from engine.storage.paths import is_uri

# Bytes that the names of files below OUT.run/ may need, with the folder of an expert.
_INNER = 400
_PATH_MAX = 4096
# Folders of the kernel, whose files are no files on a disk; /dev/shm in them is in memory, and any program's to use.
_KERNEL, _MEMORY = ("/proc", "/sys", "/dev"), "/dev/shm"
_OTHER = "give another --out"
_IMAGES = "the image folder"


def check_place(out: str) -> None:
    """Check that a folder can be made at `out`, and that it can be renamed and replaced there.

    Raises:
        OutputError: it is a root, a bucket, an ambiguous address, a mount point, in a folder of the kernel, below a
            file or another run's state, read-only or too long.
    """
    if is_uri(out):
        address = Address.of(out, OutputError)
        if not address.path:
            raise OutputError("the output is a whole bucket", out, str(replace(address, path="folder")))
        if not {"", ".", ".."}.isdisjoint(address.path.split("/")):
            # Some servers and proxies resolve these names, others do not.
            raise OutputError(
                "the address has an empty part, . or ..", out, f"{address.scheme}://bucket/folder", _OTHER
            )
        return
    path = Path(out)
    if not path.name:
        raise OutputError("the output is the root of the file system", out, "a folder", _OTHER)
    real = Path(os.path.realpath(path))
    kernel = next((folder for folder in _KERNEL if real.is_relative_to(folder)), None)
    if kernel and not real.is_relative_to(_MEMORY):
        raise OutputError(f"the output lies in {kernel}, a folder of the kernel", out, "a folder on a disk", _OTHER)
    state = path.with_name(f"{path.name}.run")
    _check_length(path, state)
    try:
        for folder in (path, state):
            if mount := _mounted(folder):
                raise OutputError(
                    "the folder is a mount point, which cannot be renamed or replaced",
                    mount,
                    do=f"give a folder in it: --out {path / 'merged'}" if mount == str(path) else _OTHER,
                )
            if folder.exists() and not folder.is_dir():
                raise OutputError("there is a file of this name", str(folder), "a folder", _OTHER)
        for parent in path.parents:
            if (parent / MARKER).is_file():
                raise OutputError("the output lies in the state of another run", str(parent), do=_OTHER)
        check_creatable(path, _OTHER)
        for folder in (path, state):
            if folder.is_dir():
                check_writable(folder, _OTHER)
    except OSError as error:
        raise OutputError(f"the output folder cannot be used: {error.strerror}", out, do=_OTHER) from error


def check_apart(plan: Plan, out: str, config: Path | None = None) -> None:
    """Check that no input lies at or below `out` or the folder of the run's state, and that `out` lies below no input.

    `log_dir` and `cache` lie in neither folder either.

    Args:
        plan: The plan.
        out: The output, an absolute path or a URI.
        config: The config file, if there is one.

    Raises:
        OutputError: the output and an input are in each other's place, or `log_dir` or `cache` is in the output's.
    """
    state, inputs = beside(out, ".run"), list(_inputs(plan, config))
    for key, folder in (("log_dir", plan.config.log_dir), ("cache", plan.config.cache)):
        if folder not in (None, "off") and any(_holds(place, folder) for place in (out, state)):
            # The folder of the state is removed at the end, and the output holds the files of the merge alone.
            raise OutputError(
                f"the output is in the place of `{key}`",
                folder,
                "a folder outside the output and its state",
                f"set another `{key}`",
            )
    for label, where in inputs:
        for place in (out, state):
            if _holds(place, where):
                raise OutputError(f"{label} is in the place of the output: {where}", place, do=_OTHER)
        if label == _IMAGES and (config is None or any(_holds(where, other) for _, other in inputs if other != where)):
            continue  # not a folder of images alone, but the one in which the config, its data and outputs lie
        if _holds(where, out):
            raise OutputError(f"the output is in the place of {label}: {where}", out, do=_OTHER)


def _inputs(plan: Plan, config: Path | None) -> Iterator[tuple[str, str]]:
    """Yield what each input is and its path or URI; for a model in object storage or of the hub also its local copy."""
    if config is not None:
        yield "the config", str(config)
    models: list[tuple[str, ModelPlan]] = [("the base", plan.base)]
    models += [(f"expert {expert.name!r}", expert) for expert in plan.experts]
    models += [("the adapter of the base", plan.base.adapter)] if plan.base.adapter else []
    models += [(f"the adapter of {expert.name!r}", expert.adapter) for expert in plan.experts if expert.adapter]
    for label, model in models:
        yield label, str(model.header.folder)
        if is_uri(model.model):
            yield label, model.model
    if plan.tokenizer and (is_uri(plan.tokenizer) or plan.tokenizer.startswith("/")):
        yield "the tokenizer", plan.tokenizer
    for given, expert in zip(plan.config.models, plan.experts, strict=True):
        for file, path in zip(given.calibration, expert.calibration, strict=False):
            yield "a calibration file", str(path)
            if is_uri(file.path):
                yield "a calibration file", file.path
    for folder in (plan.config.base_statistics, *(expert.statistics for expert in plan.config.models)):
        if folder is not None:
            yield "a folder of statistics", folder
    for state in (expert.optimizer_state for expert in plan.config.models):
        if state is not None:
            yield "the state of an optimizer", state
    for image in (image for images in plan.images for image in images):
        yield "an image", image
    if plan.config.uses_samples and plan.config.calibration.image_folder:
        yield _IMAGES, plan.config.calibration.image_folder


def beside(out: str, suffix: str) -> str:
    """Return the folder or URI beside an output whose name is the output's with a suffix."""
    if is_uri(out):
        address = Address.of(out, OutputError)
        return str(replace(address, path=f"{address.path}{suffix}"))
    return str(Path(out).with_name(f"{Path(out).name}{suffix}"))


def _holds(outer: str, inner: str) -> bool:
    """Return whether `inner` lies at or below `outer`. Two endpoints of a bucket's name count as one."""
    if is_uri(outer) != is_uri(inner):
        return False
    if is_uri(outer):
        one, other = Address.of(outer, OutputError), Address.of(inner, OutputError)
        return one.scheme == other.scheme and f"{other.key}/".startswith(f"{one.key}/")
    real = Path(os.path.realpath(inner))
    if real.is_relative_to(os.path.realpath(outer)) or Path(inner).is_relative_to(outer):
        return True
    try:
        there = os.stat(outer)  # noqa: PTH116 - as below
    except OSError:
        return False
    # Also by another name: a bind mount, or a disk that takes A and a for one name.
    for folder in (real, *real.parents):
        try:
            if os.path.samestat(there, os.stat(folder)):  # noqa: PTH116
                return True
        except OSError:
            continue
    return False


def _mounted(folder: Path) -> str | None:
    """Return a mount point at or below a folder, or None."""
    if os.path.ismount(folder):
        return str(folder)
    real = os.path.realpath(folder)
    return next((mount for mount in mount_points() if Path(mount).is_relative_to(real)), None)


def mount_points() -> list[str]:
    """Return the mount points of this process, also those of a folder of the same disk; none where /proc lacks them."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    # The fifth field; spaces, tabs, newlines and backslashes in it are written as octal numbers.
    return [
        os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4]))
        for line in lines
    ]


def _check_length(path: Path, state: Path) -> None:
    """Check the names of output and state against the limits of the disk."""
    nearest = next(parent for parent in path.parents if os.path.isdir(parent))  # noqa: PTH112 - for impossible names
    longest = os.pathconf(nearest, "PC_NAME_MAX")
    for name in state.parts:
        if len(os.fsencode(name)) > longest:
            what = f"the name of the output is too long: {len(os.fsencode(name)):,} bytes"
            if name == state.name:
                what += " with .run, the folder of its state"
            raise OutputError(what, f"{str(path)[:200]}…", f"at most {longest} bytes", "give a shorter --out")
    size, limit = len(os.fsencode(state)), _PATH_MAX - _INNER
    if size > limit:
        raise OutputError(
            f"the path of the output is too long: {size:,} bytes",
            f"{str(path)[:200]}…",
            f"at most {limit:,} bytes",
            "give a shorter --out",
        )
