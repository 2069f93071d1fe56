"""Computed files that later merges use again, each in a folder of its kind, named by its key and its SHA-256.

A key is the SHA-256 of all that decides the content. An entry never changes: it appears complete, under a name that
tells whether it is still whole, and may vanish at any time. Any number of processes may use one cache. Between folders
of one disk an entry is a second name of the file (a hard link) and takes no space of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import filelock

from engine.errors import ConfigError
from engine.storage.address import Address
from engine.storage.cache import below, cache_folder
from engine.storage.folder import Folder, storing
from engine.storage.local_folder import LocalFolder, digest, is_temporary
from engine.storage.paths import open_folder

# The variable that gives the default of a config's `cache`: a folder, a URI or OFF. Without it, the cache is in this
# subfolder of the cache of this program.
VARIABLE, OFF, RUNS = "EXPERT_MERGING_RUN_CACHE", "off", "runs"
MARKER, TRIMMING = "expert-merging-cache.json", "trimming"
# Version of the layout of the folder and of the entries' contents. Entries of another version are not used.
FORMAT = 1
KINDS = (
    *("digests", "samples", "inputs", "targets", "surveys", "factors", "magnitudes", "priors", "steps", "metrics"),
    *("statistics", "moments"),
)
_ENTRY = re.compile(rf"({'|'.join(KINDS)})/([0-9a-f]{{64}})-([0-9a-f]{{64}})")
# Most entries, which bounds the time to list them. Of the bytes that the disk could give to the cache, its own
# included, it takes half at most. A temporary file of this age in seconds has no writer any more.
MOST_ENTRIES, SHARE, ABANDONED = 200_000, 0.5, 86_400.0


def default_place() -> str:
    """Return the folder or URI of the cache of merges whose config names none; OFF for no cache.

    Raises:
        InputError: There is no home folder; see `cache_folder`.
    """
    return os.environ.get(VARIABLE) or str(cache_folder() / RUNS)


@dataclass(frozen=True)
class Entry:
    """A file of a cache: its name, its bytes, and when it was last used (in object storage: written), in seconds."""

    name: str
    size: int
    used: float

    @property
    def kind(self) -> str:
        """The kind of the entry, one of KINDS."""
        return self.name.partition("/")[0]


class ContentCache:
    """A cache in a folder on a disk or in object storage.

    Args:
        where: Path or URI of the folder, which may be missing.
        limit: Bytes that the cache may take; `trim` holds it.
        copies: Bytes that one process may copy into it: from another disk, files are copied and not linked.

    Raises:
        ConfigError: The folder holds something else, or a cache of another version.
        StorageError: The folder cannot be created or read.
    """

    def __init__(self, where: str, limit: int, copies: int) -> None:
        self._folder, self._limit, self._copies = open_folder(where), limit, copies
        # SHA-256 by key, of each kind: listed at first use.
        self._known: dict[str, dict[str, str]] = {}
        if isinstance(self._folder, LocalFolder):
            with storing(self._folder.path):
                self._folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check()

    @property
    def where(self) -> str:
        """Path or URI of the folder."""
        return self._folder.where

    def has(self, kind: str, key: str) -> bool:
        """Return whether the cache had an entry when the kind was first listed, or has got it since."""
        return key in self._of(kind)

    def read(self, kind: str, key: str) -> bytes | None:
        """Return the content of an entry, or None if there is none. A damaged entry is removed."""
        sha256 = self._of(kind).get(key)
        name = f"{kind}/{key}-{sha256}"
        if sha256 is None or not self._is_file(name):
            return None
        try:
            content = self._folder.read(name)
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest() != sha256:
            self._drop(kind, key)
            return None
        self._touch(name)
        return content

    def write(self, kind: str, key: str, content: bytes) -> None:
        """Add an entry of this content."""
        sha256 = hashlib.sha256(content).hexdigest()
        entry = f"{kind}/{key}-{sha256}"
        if self._of(kind).get(key) != sha256 or not self._is_file(entry):
            self._folder.write(entry, content)
            self._added(kind, key, sha256)

    def take(self, kind: str, key: str, folder: Folder, name: str) -> str | None:
        """Bring an entry into a folder under a name, and return its SHA-256; None if there is no such entry.

        A damaged entry is removed.
        """
        sha256 = self._of(kind).get(key)
        entry = f"{kind}/{key}-{sha256}"
        if sha256 is None or not self._is_file(entry):
            return None
        try:
            linked = _link(self._folder, entry, folder, name)
        except FileNotFoundError:
            return None
        if linked is None:
            if (content := self.read(kind, key)) is not None:
                folder.write(name, content)
            return sha256 if content is not None else None
        if digest(linked.temporary) != sha256:
            linked.forget()
            self._drop(kind, key)
            return None
        linked.appear()
        self._touch(entry)
        return sha256

    def give(self, kind: str, key: str, folder: Folder, name: str, sha256: str | None = None) -> None:
        """Add a file of a folder as an entry. `sha256`: that of the file, if it is known.

        Nothing happens if the file is gone, or would have to be copied when enough was.
        """
        with suppress(FileNotFoundError):
            sha256 = sha256 or folder.digest(name)
            entry = f"{kind}/{key}-{sha256}"
            if self._of(kind).get(key) == sha256 and self._is_file(entry):
                return
            if (linked := _link(folder, name, self._folder, entry)) is not None:
                linked.appear()
            else:
                size = folder.size(name)
                if size > self._copies:
                    return
                self._folder.write(entry, folder.read(name))
                self._copies -= size
            self._added(kind, key, sha256)

    def entries(self) -> list[Entry]:
        """Return all entries, in any order."""
        return [entry for entry in self._files() if _ENTRY.fullmatch(entry.name)]

    def trim(self) -> None:
        """Remove the entries that were not used for the longest time, until the cache is within its limits.

        One process at a time does so; another one leaves it to the first.
        """
        if not isinstance(self._folder, LocalFolder):
            self._trim()
            return
        root = self._folder.path
        with storing(root), suppress(filelock.Timeout), filelock.FileLock(root / TRIMMING, timeout=0):
            for path in [path for kind in KINDS for path in (root / kind).glob(".*.part")]:
                with suppress(FileNotFoundError):
                    if is_temporary(path) and path.lstat().st_mtime < time.time() - ABANDONED:
                        path.unlink()
            self._trim()

    def clear(self, older_than: float = 0.0) -> list[Entry]:
        """Remove the entries that were not used for this number of seconds, and return them."""
        old = [entry for entry in self.entries() if entry.used <= time.time() - older_than]
        self._remove(old)
        return old

    def _trim(self) -> None:
        entries = sorted(self.entries(), key=lambda entry: (entry.used, entry.name))
        taken, limit, excess = sum(entry.size for entry in entries), self._limit, len(entries) - MOST_ENTRIES
        if isinstance(self._folder, LocalFolder):
            limit = min(limit, int(SHARE * (shutil.disk_usage(self._folder.path).free + taken)))
        removed = []
        for number, entry in enumerate(entries):
            if taken <= limit and number >= excess:
                break
            taken -= entry.size
            removed.append(entry)
        self._remove(removed)

    def _remove(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._folder.remove(entry.name)
        self._known.clear()

    def _check(self) -> None:
        """Write the marker into an empty folder, or check that of another start, and that no link leads out of it."""
        if isinstance(self._folder, LocalFolder):
            self._refuse([kind for kind in KINDS if (self._folder.path / kind).is_symlink()])
        if not self._folder.exists(MARKER):
            if others := sorted(self._folder.entries() - {TRIMMING}):
                if not self._folder.exists(MARKER):  # another process may just have made the folder a cache
                    self._refuse(others)
                return
            self._folder.write(MARKER, json.dumps({"program": "expert-merging", "format": FORMAT}).encode())
            return
        try:
            version = json.loads(self._folder.read(MARKER))["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            version = None
        if version != FORMAT:
            raise ConfigError(
                "the folder holds the cache of another version of this program",
                self.where,
                f"format {FORMAT}",
                "give another folder as `cache`, or `off`",
            )

    def _refuse(self, others: list[str]) -> None:
        """Raise a ConfigError if the folder holds files or links of others."""
        if others:
            raise ConfigError(
                f"the folder of the cache holds something else: {', '.join(map(repr, others[:3]))}",
                self.where,
                "no such folder, an empty one, or one that an earlier merge made a cache",
                "give another folder as `cache`, or `off`",
            )

    def _of(self, kind: str) -> dict[str, str]:
        if kind not in self._known:
            found = (_ENTRY.fullmatch(name) for name in sorted(self._folder.names(kind)))
            self._known[kind] = {match[2]: match[3] for match in found if match}
        return self._known[kind]

    def _added(self, kind: str, key: str, sha256: str) -> None:
        """Note a new entry, and remove an earlier one of its key, which other content has or had."""
        known = self._of(kind)
        if known.get(key) not in (None, sha256):
            self._folder.remove(f"{kind}/{key}-{known[key]}")
        known[key] = sha256

    def _drop(self, kind: str, key: str) -> None:
        self._folder.remove(f"{kind}/{key}-{self._of(kind).pop(key)}")

    def _is_file(self, name: str) -> bool:
        """Return whether an entry is a regular file: in a folder that others may write, it could be a link."""
        if not isinstance(self._folder, LocalFolder):
            return True
        try:
            return stat.S_ISREG((self._folder.path / name).lstat().st_mode)
        except FileNotFoundError:
            return False

    def _touch(self, name: str) -> None:
        if isinstance(self._folder, LocalFolder):
            with suppress(OSError):  # another user's, or gone
                os.utime(self._folder.path / name)

    def _files(self) -> Iterator[Entry]:
        """Yield all regular files in the folders of the kinds."""
        if not isinstance(self._folder, LocalFolder):
            address = Address.of(self.where)
            with address.connection() as files:
                found = [info for kind in KINDS for info in below(files, (address / kind).key, absent=True)]
            start = len(address.key) + 1
            yield from (Entry(info.path[start:], info.size, info.mtime.timestamp()) for info in found)
            return
        for kind in KINDS:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._folder.path / kind) as there:
                for file in there:
                    with suppress(FileNotFoundError):
                        if file.is_file(follow_symlinks=False):
                            status = file.stat(follow_symlinks=False)
                            yield Entry(f"{kind}/{file.name}", status.st_size, status.st_mtime)


@dataclass(frozen=True)
class _Link:
    """A second name of a file: the temporary one that it has, and the one that it gets."""

    temporary: Path
    path: Path

    def appear(self) -> None:
        """Give the file its name."""
        with storing(self.path):
            self.temporary.replace(self.path)
        self.forget()

    def forget(self) -> None:
        """Remove the temporary name. Renaming leaves it where both names are of one file already."""
        self.temporary.unlink(missing_ok=True)


def _link(source: Folder, name: str, target: Folder, new: str) -> _Link | None:
    """Link a file to a temporary name beside the new one; None where this is not possible.

    It is not on two disks, in object storage, and for a file of another user, which a run's state must not hold.

    Raises:
        FileNotFoundError: The file is gone.
    """
    if not (isinstance(source, LocalFolder) and isinstance(target, LocalFolder)):
        return None
    file, path = source.path / name, target.path / new
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        return None
    temporary = path.with_name(f".{uuid4().hex}.part")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, temporary)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    return _Link(temporary, path)


def summary(entries: list[Entry]) -> dict[str, tuple[int, int, float]]:
    """Return number, bytes and last use of the entries of each kind that there is."""
    by_kind = defaultdict[str, list[Entry]](list)
    for entry in entries:
        by_kind[entry.kind].append(entry)
    return {
        kind: (len(of), sum(entry.size for entry in of), max(entry.used for entry in of))
        for kind in KINDS
        if (of := by_kind[kind])
    }
