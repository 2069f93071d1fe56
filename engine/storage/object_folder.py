"""Folders on a disk and in object storage: a file is there under its name whole, or not at all.

State, output and inputs of a merge go through here, by path or by URI (see `objects`; `file://` is a path). What is
read from object storage is copied into a cache on this machine first. Knows no models and no Ray.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from engine.errors import OutputError, StorageError
from engine.storage.address import Address
from engine.storage.cache import below, cache_folder
from engine.storage.folder import LOCK, RawFile, in_use, storing
from engine.storage.lease import Lease

# Bytes that are sent at a time and read at a time, and files that are fetched at a time.
PART = 64 << 20


@dataclass(frozen=True)
class ObjectFolder:
    """A folder in object storage, by URI; see `Folder`."""

    where: str

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        address = Address.of(self.where) / name
        with address.connection() as files, files.open_input_stream(address.key) as stream:
            data: bytes = stream.read()
        return data

    def exists(self, name: str) -> bool:
        """See `Folder`."""
        address = Address.of(self.where) / name
        with address.connection() as files:
            return bool(files.get_file_info(address.key).is_file)

    def size(self, name: str) -> int:
        """See `Folder`."""
        address = Address.of(self.where) / name
        with address.connection() as files:
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
        with (address / under).connection() as files:
            return {one.path[len(address.key) + 1 :] for one in below(files, (address / under).key, absent=True)}

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
    with suppress(FileNotFoundError), address.connection() as files:
        if files.get_file_info(address.key).is_file:
            files.delete_file(address.key)
        else:
            files.delete_dir(address.key)


def _send(address: Address, data: Any) -> None:
    def send() -> None:
        with address.connection() as files, files.open_output_stream(address.key) as stream:
            for start in range(0, len(data), PART):
                stream.write(memoryview(data)[start : start + PART])
                # What is written waits in memory to be sent, without bound but for this.
                stream.flush()

    # In a thread of its own, where no signal's exception can come between and have half of it closed. After an error
    # of the storage's, closing fails too, and there is no object.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(send).result()
