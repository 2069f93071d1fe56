"""The identity of a merge: everything that decides its result, by name, so that a difference can be named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.errors import InputError
from engine.storage.local_folder import digest
from engine.untrusted import parse_json, shown


@dataclass(frozen=True)
class InputFile:
    """An input file as it was when the identity was made.

    Attributes:
        size: Its bytes.
        stamp: What changes with the content: time of modification, inode and time of the last change to the inode, in
            nanoseconds. Of a cached copy of an object, the object's time alone, and of a file of a hub's commit
            nothing, because these are the same on every machine.
        sha256: SHA-256 in hexadecimal; None for weights that have not been hashed yet.
        path: The file on this machine.
    """

    size: int
    stamp: tuple[int, ...]
    sha256: str | None
    path: Path = field(default=Path(), compare=False)

    def encode(self) -> str:
        """Return size, SHA-256 and stamp, separated by spaces."""
        return " ".join([str(self.size), self.sha256 or "-", *map(str, self.stamp)])

    @classmethod
    def decode(cls, text: str) -> InputFile:
        """Return the file that `encode` encoded.

        Raises:
            ValueError: the text is another.
        """
        size, sha256, *stamp = text.split(" ")
        return cls(int(size), tuple(map(int, stamp)), None if sha256 == "-" else sha256)

    def is_as(self, before: InputFile) -> bool:
        """Return whether this is the file of before. Its content decides where it is known; then a copy is as good."""
        if self.size != before.size:
            return False
        if before.sha256 is None or (self.sha256 is None and self.stamp == before.stamp):
            return self.stamp == before.stamp
        try:
            return before.sha256 == (self.sha256 or digest(self.path))
        except OSError:
            return False


@dataclass(frozen=True)
class Identity:
    """Everything that decides the result of a merge.

    Attributes:
        options: The options of the config, by their path in it, as JSON.
        versions: The versions of this program and of the packages that compute.
        files: The input files, by a name that is the same on every machine.
    """

    options: Mapping[str, str]
    versions: Mapping[str, str]
    files: Mapping[str, InputFile]

    def differences(self, now: Identity) -> list[str]:
        """Return what differs now, in words; nothing if the result is the same.

        Weights whose stamps differ are hashed if their SHA-256 is known.
        """
        return [
            *_changes(self.options, now.options),
            *_changes(self.versions, now.versions),
            *self.changed_files(now),
        ]

    def changed_files(self, now: Identity) -> list[str]:
        """Return which input files are not as they were, in words; see `differences`."""
        changed = []
        for name in sorted({*self.files, *now.files}):
            before, after = self.files.get(name), now.files.get(name)
            if before is None or after is None:
                changed.append(f"{name} is {'new' if before is None else 'gone'}")
            elif not after.is_as(before):
                changed.append(f"{name} changed")
        return changed

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of the files of which it is known, by name."""
        return {name: file.sha256 for name, file in self.files.items() if file.sha256 is not None}

    def with_digests(self, digests: Mapping[str, str]) -> Identity:
        """Return the identity with the SHA-256 of files, by name; other names are ignored."""
        files = {name: replace(file, sha256=digests.get(name, file.sha256)) for name, file in self.files.items()}
        return replace(self, files=files)

    def encode(self) -> bytes:
        """Return the identity as JSON."""
        files = {name: file.encode() for name, file in self.files.items()}
        content = {"options": self.options, "versions": self.versions, "files": files}
        return json.dumps(content, sort_keys=True, indent=0).encode()


def decode(content: bytes, where: str) -> Identity:
    """Return the identity that `Identity.encode` encoded.

    Raises:
        InputError: the content cannot be an identity.
    """
    try:
        raw = parse_json(content.decode(), where, InputError)
        options, versions, given = (dict(raw[key]) for key in ("options", "versions", "files"))
        files = {name: InputFile.decode(text) for name, text in given.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("not the identity of a merge", where) from error
    if not all(isinstance(text, str) for text in (*options.values(), *versions.values())):
        raise InputError("not the identity of a merge", where)
    return Identity(options, versions, files)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{shown(name)} was {shown(before.get(name, 'not set'))}, is {shown(now.get(name, 'not set'))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
