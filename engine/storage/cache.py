"""Copies of objects in a cache on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import filelock

from engine.errors import InputError
from engine.machine import check_home
from engine.storage.address import Address
from engine.storage.folder import Folder, storing
from engine.storage.local_folder import LocalFolder

# Bytes read from an object at a time, and objects copied at a time.
CHUNK = 8 << 20
FETCHES = 8


def below(files: Any, key: str, absent: bool = False) -> list[Any]:
    """Return pyarrow's `FileInfo` of every object below a key.

    Raises:
        FileNotFoundError: there is none, and not `absent`.
    """
    from pyarrow.fs import FileSelector

    infos = files.get_file_info(FileSelector(key, allow_not_found=absent, recursive=True))
    return [info for info in infos if info.is_file]


def cache_folder() -> Path:
    """Return the folder of the cache: EXPERT_MERGING_CACHE, or ~/.cache/expert-merging.

    Raises:
        InputError: neither EXPERT_MERGING_CACHE nor a home folder is set.
    """
    check_home(InputError, "EXPERT_MERGING_CACHE")
    return Path(os.environ.get("EXPERT_MERGING_CACHE") or "~/.cache/expert-merging").expanduser().absolute()


def fetch(
    uri: str,
    patterns: Sequence[str] | None = None,
    error_type: type[InputError] = InputError,
    without: Sequence[str] = (),
) -> Path:
    """Copy an object, or a folder of objects, into the cache, and return the path of the copy.

    Objects whose copy has the same size and modification time are not copied again. A copy gets the modification time
    of its object, so that it is the same on every machine. Cached files that match but are no longer in the storage
    are removed.

    Args:
        uri: The address of one object, or of a folder.
        patterns: Of a folder, copy only objects whose names match one of these patterns (fnmatch).
        error_type: The class of the error to raise.
        without: Of a folder, do not copy objects whose names match one of these.

    Raises:
        InputError: (`error_type`) there is no such object, or the storage request failed.
        StorageError: the copy cannot be written.
    """
    address = Address.of(uri, error_type)
    target = cache_folder() / address.local
    facts = _facts(address, patterns, error_type, without)
    lock = cache_folder() / "locks" / sha256(str(target).encode()).hexdigest()
    with storing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
    # No timeout: a process that waits here needs the same files.
    with filelock.FileLock(lock):
        for name in LocalFolder(target).names() - facts.keys():
            if _matches(name, patterns, without):
                LocalFolder(target).remove(name)
        ended = Event()
        with ThreadPoolExecutor(FETCHES) as threads:
            copies = [
                threads.submit(_copy, address, fact, target / name, error_type, ended) for name, fact in facts.items()
            ]
            try:
                for copy in as_completed(copies):
                    copy.result()
            finally:
                ended.set()
                threads.shutdown(cancel_futures=True)
    return target


@contextmanager
def borrowed(folder: Folder, name: str) -> Iterator[Path]:
    """Yield a local path of a file of `folder`; for object storage, the path of a private copy.

    The copy is unlinked when the context ends. A memory map of it stays valid.

    Raises:
        InputError: there is no such object, or the storage request failed.
        StorageError: the copy cannot be written.
    """
    if isinstance(folder, LocalFolder):
        yield folder.path / name
        return
    address, parent = Address.of(folder.where) / name, cache_folder() / "borrowed"
    (fact,) = _facts(address, None, InputError).values()
    with storing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        _copy(address, fact, Path(temporary) / "file", InputError, Event())
        yield Path(temporary) / "file"


def move_out(folder: Folder, name: str, target: Path) -> None:
    """Move a file of `folder` to a local path, whose folders are created."""
    with borrowed(folder, name) as path, storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)


def _facts(
    address: Address, patterns: Sequence[str] | None, error_type: type[InputError], without: Sequence[str] = ()
) -> dict[str, Any]:
    """Return pyarrow's `FileInfo` of the objects to copy, by name relative to the address ('' for a single object)."""
    infos: list[Any] = []
    _check(address.path or "bucket", address, error_type)
    with suppress(FileNotFoundError), address.connection(error_type) as files:
        info = files.get_file_info(address.key)
        infos = [info] if info.is_file else below(files, address.key)
    facts = {info.path[len(address.key) + 1 :]: info for info in infos}
    facts = {name: info for name, info in facts.items() if not name or _matches(name, patterns, without)}
    if not facts:
        expected = f"objects that match {', '.join(patterns)}" if patterns else ""
        raise error_type("there is no such object", str(address), expected)
    for name in filter(None, facts):
        _check(name, address, error_type)
    return facts


def _check(name: str, address: Address, error_type: type[InputError]) -> None:
    """Refuse an object's name that as a path would lead out of the cache's folder; object storage allows any name."""
    if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise error_type(f"the object's name is not a path inside its folder: {name!r}", str(address))


def _matches(name: str, patterns: Sequence[str] | None, without: Sequence[str]) -> bool:
    wanted = patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in without)


def _copy(address: Address, fact: Any, target: Path, error_type: type[InputError], ended: Event) -> None:
    # Whole seconds: a storage may report fractions in a listing, but not for a single object.
    changed_at = int(fact.mtime.timestamp())
    if target.is_file() and (target.stat().st_size, target.stat().st_mtime) == (fact.size, changed_at):
        return
    where = f"{address.scheme}://{fact.path}"
    changed = error_type("the object changed while it was copied", where, do="run the same command again")
    copied = 0
    try:
        with (
            LocalFolder(target.parent).create(target.name) as out,
            address.connection(error_type) as files,
            files.open_input_stream(fact.path) as stream,
        ):
            while not ended.is_set() and (data := stream.read(CHUNK)):
                copied += out.write(data)
            if copied != fact.size:
                raise changed
    except FileNotFoundError as error:
        raise changed from error
    os.utime(target, (changed_at, changed_at))
