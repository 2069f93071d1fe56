"""Folders on a disk, in which a file appears under its name only when it is complete, even if its writer dies."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import filelock

from engine.errors import OutputError
from engine.storage.folder import LOCK, RawFile, in_use, storing


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a disk; see `Folder`. A file is written under a temporary name of its own, then renamed."""

    path: Path

    @property
    def where(self) -> str:
        """See `Folder`."""
        return str(self.path)

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        return (self.path / name).read_bytes()

    def exists(self, name: str) -> bool:
        """See `Folder`."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """See `Folder`."""
        return (self.path / name).stat().st_size

    def digest(self, name: str) -> str:
        """See `Folder`."""
        return digest(self.path / name)

    def write(self, name: str, data: bytes) -> None:
        """See `Folder`."""
        with self.create(name) as out:
            out.write(data)

    @contextmanager
    def create(self, name: str) -> Iterator[RawFile]:
        """See `Folder`; missing parent folders are created."""
        path = self.path / name
        temporary = path.with_name(f".{uuid4().hex}.part")
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(temporary, "xb", buffering=0)  # noqa: SIM115 - closed below
        try:
            with file:
                yield RawFile(file, path)
                with storing(path):
                    os.fsync(file.fileno())
            with storing(path):
                temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # report the first error, not this one
                temporary.unlink()
            raise

    def names(self, under: str = "") -> set[str]:
        """See `Folder`."""
        paths = (path for path in (self.path / under).rglob("*") if path.is_file() and not is_temporary(path))
        return {path.relative_to(self.path).as_posix() for path in paths}

    def entries(self) -> set[str]:
        """See `Folder`."""
        found = set()
        for folder, inner, files in os.walk(self.path, onerror=_raise):
            here = Path(folder)
            # os.walk lists a link to a folder as a folder, and does not enter it.
            links = [name for name in inner if (here / name).is_symlink()]
            found |= {here / name for name in (*files, *links) if not is_temporary(here / name)}
            found |= {here} if here != self.path and not inner and not files else set()
        return {path.relative_to(self.path).as_posix() for path in found}

    def remove(self, name: str) -> None:
        """See `Folder`."""
        path = self.path / name
        with storing(path):
            if not name:
                for entry in path.iterdir() if path.is_dir() else ():
                    if entry.name != LOCK:
                        self.remove(entry.name)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def child(self, name: str) -> LocalFolder:
        """See `Folder`."""
        return LocalFolder(self.path / name)

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """See `Folder`; the operating system releases the lock of a process that died."""
        lock = filelock.FileLock(self.path / LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            raise in_use(self.where) from error
        except OSError as error:
            raise OutputError(f"the output folder cannot be created: {error.strerror}", self.where) from error
        try:
            sweep(self.path)
            yield lambda: None
        finally:
            if self.path.is_dir() and {path.name for path in self.path.iterdir()} <= {LOCK}:
                (self.path / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # somebody has put a file there
                    self.path.rmdir()
            lock.release()


def check_creatable(path: Path, do: str) -> None:
    """Check that a file or folder can be created at a path. Creates nothing; `do` is the advice of the errors.

    Raises:
        OutputError: the nearest folder above that exists is a file or cannot be written, or the name is too long.
    """
    try:
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir():
            raise OutputError("the output lies below a file", str(nearest), "a folder", do)
        with suppress(FileNotFoundError):
            path.lstat()
    except OSError as error:
        raise OutputError(f"the output cannot be created: {error.strerror}", str(path), do=do) from error
    check_writable(nearest, do)


def check_writable(folder: Path, do: str) -> None:
    """Check that files can be created in a folder.

    Raises:
        OutputError: they cannot.
    """
    # False for a file system that is mounted read-only, also for root.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError("the folder cannot be written", str(folder), "permission to write", do)


def is_temporary(path: Path) -> bool:
    """Return whether this is the temporary file of a `LocalFolder`."""
    return bool(re.fullmatch(r"\.[0-9a-f]{32}\.part", path.name))


def sweep(folder: Path) -> None:
    """Remove the temporary files of writers that died. A writer that is still running fails when it ends its file."""
    for path in [path for path in folder.rglob(".*.part") if is_temporary(path)]:
        path.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    """Raise an error of `os.walk`, which otherwise passes over a folder that it cannot read; not if there is none."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
