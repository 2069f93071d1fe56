"""A part of the house that has no words of its own yet."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import OutputError, StorageError

LOCK = "lock"


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Tell what a disk refuses, by the file in question."""
    try:
        yield
    except OSError as error:
        what, do = f"the disk refuses: {error.strerror}", "put that right"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            do = "free some room"
        if error.errno == errno.ENOSPC:
            disk = next(folder for folder in path.parents if folder.exists())
            what += f"; {shutil.disk_usage(disk).free:,} bytes are free"
        raise StorageError(what, str(path), do=f"{do} and run the same command: it goes on from here") from error


def in_use(where: str) -> OutputError:
    """That a folder is locked."""
    return OutputError("another merge is writing to this folder", where, do="wait for it, or give another --out")


@dataclass(frozen=True)
class RawFile:
    """A file that is being written, without a buffer: so closing it has nothing left to do, and no error of its own."""

    file: Any
    path: Path

    def write(self, data: Any) -> int:
        """Append all of a buffer of bytes, and say how many they are. Raises StorageError."""
        left = whole = memoryview(data).cast("B")
        with storing(self.path):
            while left:
                left = left[self.file.write(left) :]
        return len(whole)


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
