"""Folders on a disk and in object storage: a file is there under its name whole, or not at all.

State, output and inputs of a merge go through here, by path or by URI (see `objects`; `file://` is a path). What is
read from object storage is copied into a cache on this machine first. Knows no models and no Ray.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import filelock

from engine.disk import LOCK, LocalFolder, RawFile, in_use, storing
from engine.errors import InputError, OutputError, StorageError
from engine.lease import Lease
from engine.objects import Address

# Bytes that are sent at a time and read at a time, and files that are fetched at a time.
PART = 64 << 20
CHUNK = 8 << 20
FETCHES = 8


class Folder(Protocol):
    """A handle of one folder, which travels. Names are relative, with `/`; what cannot be written is a StorageError."""

    @property
    def where(self) -> str:
        """The path or URI, for messages."""

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, in place of an earlier one if there is one."""

    def create(self, name: str) -> AbstractContextManager[RawFile]:
        """A file to write piece by piece: it takes its name when the context ends, and never after an exception."""

    def names(self, under: str = "") -> set[str]:
        """All whole files below `under`, named from this folder."""

    def remove(self, name: str) -> None:
        """Remove a file, or all below a name; `""`: all but a lock. Nothing there is no error."""

    def child(self, name: str) -> Folder:
        """A folder in this one."""

    def locked(self) -> AbstractContextManager[Callable[[], None]]:
        """Hold this folder alone. It goes when the context ends, if nothing but the lock is in it then.

        The context's value raises StorageError, when it is called, if another process has taken the folder over.

        Raises:
            OutputError: another process is at it, or the folder cannot be used.
        """


def is_uri(text: str) -> bool:
    """Whether this names something in object storage."""
    return text.startswith(("s3://", "gs://"))


def as_path(text: str) -> Path:
    """What a path or a `file://` URI names on this machine."""
    return Path(unquote(urlsplit(text).path) if text.startswith("file://") else text)


def open_folder(where: Path | str) -> Folder:
    """A folder by its path or URI; it need not be there yet."""
    text = str(where)
    return ObjectFolder(str(Address.of(text))) if is_uri(text) else LocalFolder(as_path(text))


@dataclass(frozen=True)
class ObjectFolder:
    """A folder in object storage, by URI; see `Folder`."""

    where: str

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        address = Address.of(self.where) / name
        with address.asked() as files, files.open_input_stream(address.key) as stream:
            data: bytes = stream.read()
        return data

    def exists(self, name: str) -> bool:
        """See `Folder`."""
        address = Address.of(self.where) / name
        with address.asked() as files:
            return bool(files.get_file_info(address.key).is_file)

    def size(self, name: str) -> int:
        """See `Folder`."""
        address = Address.of(self.where) / name
        with address.asked() as files:
            found = files.get_file_info(address.key)
        if not found.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(address))
        return int(found.size)

    def write(self, name: str, data: bytes) -> None:
        """See `Folder`."""
        _send(Address.of(self.where) / name, data)

    @contextmanager
    def create(self, name: str) -> Iterator[RawFile]:
        """See `Folder`; until it is whole, the file is on this machine's disk."""
        # pyarrow cannot abandon a stream: closed or dropped, even after an exception, it makes an object of what it has
        # been given. So nothing is sent before all of it is there, in a file without a name.
        room = cache_folder() / "uploads"
        with storing(room):
            room.mkdir(parents=True, exist_ok=True)
            file: Any = tempfile.TemporaryFile(dir=room, buffering=0)  # noqa: SIM115 - closed below
        with file:
            yield RawFile(file, room)
            with storing(room):
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""
            _send(Address.of(self.where) / name, data)

    def names(self, under: str = "") -> set[str]:
        """See `Folder`."""
        address = Address.of(self.where)
        with (address / under).asked() as files:
            return {one.path[len(address.key) + 1 :] for one in _below(files, (address / under).key, absent=True)}

    def remove(self, name: str) -> None:
        """See `Folder`."""
        address = Address.of(self.where)
        for top in [name] if name else {one.partition("/")[0] for one in self.names()} - {LOCK}:
            _delete(address / top)

    def child(self, name: str) -> ObjectFolder:
        """See `Folder`."""
        return ObjectFolder(str(Address.of(self.where) / name))

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """See `Folder`; the lock of a process that died is free when nobody has renewed it for half a minute."""
        lease = Lease(self)
        try:
            if not lease.take():
                raise in_use(self.where)
        except StorageError as error:
            raise OutputError(error.what, self.where, do=error.do) from error
        try:
            yield lease.held
        finally:
            if lease.end():
                # Without the folder itself, in whose place pyarrow would leave an empty object.
                _delete(Address.of(self.where) / ("" if self.names() <= {LOCK} else LOCK))


def _delete(address: Address) -> None:
    with suppress(FileNotFoundError), address.asked() as files:
        if files.get_file_info(address.key).is_file:
            files.delete_file(address.key)
        else:
            files.delete_dir(address.key)


def _below(files: Any, key: str, absent: bool = False) -> list[Any]:
    """Facts of all objects below a key; FileNotFoundError where there are none, unless they may be `absent`."""
    from pyarrow.fs import FileSelector

    found = files.get_file_info(FileSelector(key, allow_not_found=absent, recursive=True))
    return [one for one in found if one.is_file]


def _send(address: Address, data: Any) -> None:
    def send() -> None:
        with address.asked() as files, files.open_output_stream(address.key) as stream:
            for start in range(0, len(data), PART):
                stream.write(memoryview(data)[start : start + PART])
                # What is written waits in memory to be sent, without bound but for this.
                stream.flush()

    # In a thread of its own, where no signal's exception can come between and have half of it closed. After an error
    # of the storage's, closing fails too, and there is no object.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(send).result()


def cache_folder() -> Path:
    """Where copies of objects are kept on this machine."""
    return Path(os.environ.get("EXPERT_MERGING_CACHE") or "~/.cache/expert-merging").expanduser().absolute()


def fetch(uri: str, patterns: Sequence[str] | None = None, kind: type[InputError] = InputError) -> Path:
    """A copy on this machine of one object, or of all below the URI whose names match one of the patterns.

    Only what is not there yet, or of another size or time, is copied. A copy has the time of its object, so that it
    reads the same on every machine.

    Raises:
        InputError: the storage does not give it; `kind` says which error. StorageError: there is no room for it.
    """
    address = Address.of(uri, kind)
    target = cache_folder() / address.local
    found = _facts(address, patterns, kind)
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
            copies = [threads.submit(_copy, address, fact, target / name, kind, ended) for name, fact in found.items()]
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


def _facts(address: Address, patterns: Sequence[str] | None, kind: type[InputError]) -> dict[str, Any]:
    """What pyarrow tells of the objects to copy, by their names from the address; of the one object by ''."""
    found: list[Any] = []
    _check(address.path or "bucket", address, kind)
    with suppress(FileNotFoundError), address.asked(kind) as files:
        one = files.get_file_info(address.key)
        found = [one] if one.is_file else _below(files, address.key)
    facts = {one.path[len(address.key) + 1 :]: one for one in found}
    facts = {name: one for name, one in facts.items() if not name or _matches(name, patterns)}
    if not facts:
        raise kind("there is no such object", str(address), f"objects {', '.join(patterns)}" if patterns else "")
    for name in filter(None, facts):
        _check(name, address, kind)
    return facts


def _check(name: str, address: Address, kind: type[InputError]) -> None:
    """An object may have any name; a copy of it must not lead out of its folder."""
    if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise kind(f"an object's name is no path below a folder: {name!r}", str(address))


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def _copy(address: Address, fact: Any, target: Path, kind: type[InputError], ended: Event) -> None:
    # In whole seconds: asked for one object, a storage does not tell more than that, and listing them it may.
    changed_at = int(fact.mtime.timestamp())
    if target.is_file() and (target.stat().st_size, target.stat().st_mtime) == (fact.size, changed_at):
        return
    changed = kind("the object changed while it was copied", f"{address.scheme}://{fact.path}", do="try again")
    copied = 0
    try:
        with (
            LocalFolder(target.parent).create(target.name) as out,
            address.asked(kind) as files,
            files.open_input_stream(fact.path) as stream,
        ):
            while not ended.is_set() and (data := stream.read(CHUNK)):
                copied += out.write(data)
            if copied != fact.size:
                raise changed
    except FileNotFoundError as error:
        raise changed from error
    os.utime(target, (changed_at, changed_at))
