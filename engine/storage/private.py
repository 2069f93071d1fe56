"""Folders on a disk that only one user may read or write, and that hold nothing of another user's."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.errors import OutputError


def check_private(path: Path) -> None:
    """Create the folder for this user alone, or check that an existing one is this user's, with all that is in it.

    An existing folder is not changed; see `make_private`.

    Raises:
        OutputError: the folder, or a file or folder in it, belongs to another user or is a link; or the folder cannot
            be created or read.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise OutputError(f"the output folder cannot be created: {error.strerror}", str(path)) from error
    user: int | None = None
    for entry, status in _entries(path):
        if stat.S_ISLNK(status.st_mode):
            raise OutputError(
                "a link in place of a file or folder of a run, which a merge never creates",
                str(entry),
                do="remove the link, or give another --out",
            )
        user = _user(path, status.st_uid) if user is None else user
        if status.st_uid != user:
            raise OutputError(
                f"this belongs to another user (uid {status.st_uid})",
                str(entry),
                f"a folder for the run's state in which everything belongs to this user (uid {user})",
                "give another --out, in a folder where no other user can write",
            )


def make_private(path: Path) -> None:
    """Take all permissions on a folder of this user's from other users."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o700)


def _entries(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the folder and all that is below it, without following links. Another merge may remove files meanwhile."""

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise OutputError(f"the folder cannot be read: {error.strerror}", str(error.filename)) from error

    yield path, path.lstat()
    for folder, folders, files in os.walk(path, onerror=unreadable):
        for name in (*folders, *files):
            entry = Path(folder, name)
            try:
                yield entry, entry.lstat()
            except FileNotFoundError:
                continue


def _user(path: Path, owner: int) -> int:
    """Return the user to whom new files in the folder belong: this one, unless the file system maps users."""
    user = os.geteuid()
    if owner == user:
        return user
    # Such as root on NFS, whose files belong to nobody. The file has no name at any time.
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return user
