"""The `Folder` protocol, files being written, and errors of the disk with advice."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import OutputError, StorageError

# Name of the lock in a folder.
LOCK = "lock"
# What to do once the cause of a failure is gone. Other commands than `merge` start anew.
AGAIN = "then run the same command again, which resumes a merge"


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Convert an OSError of the block to a StorageError that names `path`, with advice for a full disk."""
    try:
        yield
    except OSError as error:
        what, do = f"the disk operation failed: {error.strerror}", "correct this"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            do = "free disk space"
        if error.errno == errno.ENOSPC:
            disk = next(folder for folder in path.parents if folder.exists())
            what += f"; {shutil.disk_usage(disk).free:,} bytes are free"
        raise StorageError(what, str(path), do=f"{do}, {AGAIN}") from error


def in_use(where: str) -> OutputError:
    """Return the error for a folder that another process has locked."""
    return OutputError("another merge is writing to this folder", where, do="wait until it ends, or use another --out")


@dataclass(frozen=True)
class RawFile:
    """A file being written. It is unbuffered, so that closing it writes nothing and cannot fail."""

    file: Any
    path: Path

    def write(self, data: Any) -> int:
        """Append a buffer of bytes and return its size.

        Raises:
            StorageError: the bytes cannot be written.
        """
        left = whole = memoryview(data).cast("B")
        with storing(self.path):
            while left:
                left = left[self.file.write(left) :]
        return len(whole)


class Folder(Protocol):
    """A handle of one folder that can be pickled. File names are relative to it, with `/`.

    A file appears under its name only when it is complete. Methods raise StorageError when the disk or the storage
    fails.
    """

    @property
    def where(self) -> str:
        """Path or URI of the folder."""

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: there is no file of that name.
        """

    def exists(self, name: str) -> bool:
        """Return whether there is a file of that name."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: there is no file of that name.
        """

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a file in hexadecimal. The file is read once, in parts.

        Raises:
            FileNotFoundError: there is no file of that name.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace an earlier one."""

    def create(self, name: str) -> AbstractContextManager[RawFile]:
        """Open a file for writing in parts. It appears under its name when the context ends without an exception."""

    def names(self, under: str = "") -> set[str]:
        """Return the names of all complete files below `under`, relative to this folder."""

    def entries(self) -> set[str]:
        """Return the names of everything in this folder at any depth, of whatever kind, temporary files excepted.

        A folder counts by its contents, an empty one by its own name. Links are not followed.
        """

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if there is one; for `""`, remove everything except the lock."""

    def child(self, name: str) -> Folder:
        """Return the handle of a folder in this one."""

    def locked(self) -> AbstractContextManager[Callable[[], None]]:
        """Lock this folder for the duration of the context.

        If the folder contains nothing but the lock when the context ends, it is removed.

        Yields:
            A function that raises StorageError if another process has taken over the lock.

        Raises:
            OutputError: another process holds the lock, or the folder cannot be used.
        """
