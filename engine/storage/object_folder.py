"""Folders in object storage, in which a file appears under its name only when it is complete."""

from __future__ import annotations

import errno
import hashlib
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
from engine.storage.cache import CHUNK, below, cache_folder
from engine.storage.folder import LOCK, RawFile, in_use, storing
from engine.storage.lease import Lease

# Bytes of a part of an upload.
PART = 64 << 20


@dataclass(frozen=True)
class ObjectFolder:
    """A folder in object storage; see `Folder`. `where` is its URI."""

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
            info = files.get_file_info(address.key)
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(address))
        return int(info.size)

    def digest(self, name: str) -> str:
        """See `Folder`."""
        address, sha256 = Address.of(self.where) / name, hashlib.sha256()
        with address.connection() as files, files.open_input_stream(address.key) as stream:
            while data := stream.read(CHUNK):
                sha256.update(data)
        return sha256.hexdigest()

    def write(self, name: str, data: bytes) -> None:
        """See `Folder`."""
        _send(Address.of(self.where) / name, data)

    @contextmanager
    def create(self, name: str) -> Iterator[RawFile]:
        """See `Folder`; the file is kept on this machine's disk until it is complete."""
        # pyarrow cannot abandon a stream: closed or dropped, even after an exception, it creates an object of the bytes
        # written so far. So the upload starts when the file is complete; until then it has no name on the disk.
        uploads = cache_folder() / "uploads"
        with storing(uploads):
            uploads.mkdir(parents=True, exist_ok=True)
            file: Any = tempfile.TemporaryFile(dir=uploads, buffering=0)  # noqa: SIM115 - closed below
        with file:
            yield RawFile(file, uploads)
            with storing(uploads):
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""
            _send(Address.of(self.where) / name, data)

    def names(self, under: str = "") -> set[str]:
        """See `Folder`."""
        address = Address.of(self.where)
        with (address / under).connection() as files:
            return {info.path[len(address.key) + 1 :] for info in below(files, (address / under).key, absent=True)}

    def entries(self) -> set[str]:
        """See `Folder`; an object counts by its name alone."""
        return self.names()

    def remove(self, name: str) -> None:
        """See `Folder`."""
        address = Address.of(self.where)
        for top in [name] if name else {file.partition("/")[0] for file in self.names()} - {LOCK}:
            _delete(address / top)

    def child(self, name: str) -> ObjectFolder:
        """See `Folder`."""
        return ObjectFolder(str(Address.of(self.where) / name))

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """See `Folder`; the lock of a process that died becomes free after 30 seconds without renewal."""
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
                # An otherwise empty folder is deleted as a whole: pyarrow leaves an empty object for the folder of a
                # deleted file.
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
                # Without a flush, pyarrow buffers unsent parts in memory without bound.
                stream.flush()

    # In a thread of its own: an exception from a signal handler would close the stream, and so create an object of half
    # the bytes. After an error of the storage, closing fails too and creates no object.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(send).result()
