"""A part of the house that has no words of its own yet."""

from __future__ import annotations

import os
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
from engine.storage.address import Address
from engine.storage.folder import Folder, storing
from engine.storage.local_folder import LocalFolder

CHUNK = 8 << 20


FETCHES = 8


def below(files: Any, key: str, absent: bool = False) -> list[Any]:
    """Facts of all objects below a key; FileNotFoundError where there are none, unless they may be `absent`."""
    from pyarrow.fs import FileSelector

    found = files.get_file_info(FileSelector(key, allow_not_found=absent, recursive=True))
    return [one for one in found if one.is_file]


def cache_folder() -> Path:
    """Where copies of objects are kept on this machine."""
    return Path(os.environ.get("EXPERT_MERGING_CACHE") or "~/.cache/expert-merging").expanduser().absolute()


def fetch(uri: str, patterns: Sequence[str] | None = None, error_type: type[InputError] = InputError) -> Path:
    """A copy on this machine of one object, or of all below the URI whose names match one of the patterns.

    Only what is not there yet, or of another size or time, is copied. A copy has the time of its object, so that it
    reads the same on every machine.

    Raises:
        InputError: the storage does not give it; `error_type` says which error. StorageError: there is no room for it.
    """
    address = Address.of(uri, error_type)
    target = cache_folder() / address.local
    found = _facts(address, patterns, error_type)
    lock = cache_folder() / "locks" / sha256(str(target).encode()).hexdigest()
    with storing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
    # Held as long as it takes: who waits here needs the same files.
    with filelock.FileLock(lock):
        for name in LocalFolder(target).names() - found.keys():
            if _matches(name, patterns):
                LocalFolder(target).remove(name)
        ended = Event()
        with ThreadPoolExecutor(FETCHES) as threads:
            copies = [
                threads.submit(_copy, address, fact, target / name, error_type, ended) for name, fact in found.items()
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
    """A file of a folder as a path on this machine; of one in object storage a copy of the caller's own.

    The copy's name goes when the context ends; its memory, mapped meanwhile, goes with the map. Raises InputError.
    """
    if isinstance(folder, LocalFolder):
        yield folder.path / name
        return
    address, room = Address.of(folder.where) / name, cache_folder() / "borrowed"
    (fact,) = _facts(address, None, InputError).values()
    with storing(room):
        room.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=room) as own:
        _copy(address, fact, Path(own) / "file", InputError, Event())
        yield Path(own) / "file"


def _facts(address: Address, patterns: Sequence[str] | None, error_type: type[InputError]) -> dict[str, Any]:
    """What pyarrow tells of the objects to copy, by their names from the address; of the one object by ''."""
    found: list[Any] = []
    _check(address.path or "bucket", address, error_type)
    with suppress(FileNotFoundError), address.connection(error_type) as files:
        one = files.get_file_info(address.key)
        found = [one] if one.is_file else below(files, address.key)
    facts = {one.path[len(address.key) + 1 :]: one for one in found}
    facts = {name: one for name, one in facts.items() if not name or _matches(name, patterns)}
    if not facts:
        raise error_type("there is no such object", str(address), f"objects {', '.join(patterns)}" if patterns else "")
    for name in filter(None, facts):
        _check(name, address, error_type)
    return facts


def _check(name: str, address: Address, error_type: type[InputError]) -> None:
    """An object may have any name; a copy of it must not lead out of its folder."""
    if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise error_type(f"an object's name is no path below a folder: {name!r}", str(address))


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def _copy(address: Address, fact: Any, target: Path, error_type: type[InputError], ended: Event) -> None:
    # In whole seconds: asked for one object, a storage does not tell more than that, and listing them it may.
    changed_at = int(fact.mtime.timestamp())
    if target.is_file() and (target.stat().st_size, target.stat().st_mtime) == (fact.size, changed_at):
        return
    changed = error_type("the object changed while it was copied", f"{address.scheme}://{fact.path}", do="try again")
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
