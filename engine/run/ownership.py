"""What a run may remove: the marker of its own folder, and the list of files of a merge that it replaces.

A folder without the marker is somebody else's, whatever its name. Of an output, only the files that the record of the
earlier merge lists, and scores that `evaluate` wrote beside them, are replaced, and only while nothing else is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.reader import RECORD_BYTES, parse_recorded
from engine.errors import ConfigError, DamagedError, InputError, OutputError, StorageError
from engine.run.contents import changed_in, names_of, read_bounded, read_manifest, strangers, strangers_in_state
from engine.run.identity import Identity, InputFile, decode
from engine.storage.folder import LOCK, Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.scores import is_scores
from engine.storage.sealed import read_sealed, write_sealed
from engine.untrusted import listed

RECORD, SCORES = "merge/config.yaml", "merge/evaluation.parquet"
RECORDED_IDENTITY = "merge/identity.json"
MARKER = "expert-merging-run.json"
# Version of the layout of OUT.run/. Increase it when a state of the version before cannot be resumed.
FORMAT = 1
IDENTITY, CLAIM = "identity.json", "claim.json"
# Content of a lock: empty on a disk, the owner and a number in object storage.
_LOCKS = re.compile(rb"([0-9a-f]{32} [0-9a-f]{32})?")


@dataclass(frozen=True)
class EarlierMerge:
    """A complete merge in the output's place.

    Attributes:
        digest: SHA-256 of its record, merge/config.yaml.
        identity: The identity that it stored; None if it is damaged or absent.
        files: The files that the merge wrote (the record alone if it does not list them), and merge/evaluation.parquet
            if `evaluate` wrote it.
        written: Those of which the size and SHA-256 are known, as they were written.
    """

    digest: str
    identity: Identity | None
    files: frozenset[str]
    written: Mapping[str, InputFile]

    @classmethod
    def read(cls, folder: Folder) -> EarlierMerge | None:
        """Return the merge in a folder, or None if there is no record of one."""
        if not folder.exists(RECORD):
            return None
        data = folder.read(RECORD)
        record: dict[str, Any] = {}
        # Within the bounds of a file from outside, because the folder may be anybody's.
        with suppress(ConfigError, UnicodeDecodeError, RecursionError):
            record = parse_recorded(data.decode(), f"{folder.where}/{RECORD}") if len(data) <= RECORD_BYTES else {}
        entry = record.get("record")
        entry = entry if isinstance(entry, dict) else {}
        listed_files = entry.get("files")
        names = listed_files if isinstance(listed_files, list) else []
        if not all(isinstance(name, str) and is_inside(name) for name in names):
            names = []
        identity = _recorded_identity(folder, entry.get("identity"))
        scores = [SCORES] if is_scores(folder, SCORES) else []
        files = frozenset({RECORD, *names, *scores})
        return cls(hashlib.sha256(data).hexdigest(), identity, files, read_manifest(folder))


@dataclass(frozen=True)
class Claim:
    """What a run may remove from the output's place, stored in its state before anything is removed.

    Attributes:
        fresh: The run was started with --fresh; the same command resumes it.
        digest: SHA-256 of the record of the merge that the run replaces; empty if the place was free.
        old: The files of that merge.
        own: Files that this run writes in the output's place, where it writes them one by one (object storage).
    """

    fresh: bool = False
    digest: str = ""
    old: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @classmethod
    def read(cls, state: Folder) -> Claim:
        """Return the claim in a run's state; an empty one if there is none, or a damaged one: nothing is removed."""
        try:
            given = json.loads(state.read(CLAIM))
            fresh, digest, old, own = (given[name] for name in ("fresh", "digest", "old", "own"))
            if not (isinstance(fresh, bool) and isinstance(digest, str)):
                return cls()
            names = [*old, *own]
            if not all(isinstance(name, str) and is_inside(name) for name in names):
                return cls()
            return cls(fresh, digest, tuple(old), tuple(own))
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return cls()

    @classmethod
    def to_replace(cls, merge: EarlierMerge | None, fresh: bool) -> Claim:
        """Return the claim of a new run that replaces this merge, if there is one."""
        return cls(fresh) if merge is None else cls(fresh, merge.digest, tuple(merge.files))

    def write(self, state: Folder) -> None:
        """Store the claim."""
        content = {"fresh": self.fresh, "digest": self.digest, "old": sorted(self.old), "own": sorted(self.own)}
        state.write(CLAIM, json.dumps(content).encode())

    def allows(self, merge: EarlierMerge | None) -> bool:
        """Return whether the run was started to replace this merge."""
        return merge is not None and merge.digest == self.digest


def check_state(state: Folder) -> None:
    """Check that the folder of a run's state is free or this program's own, before anything in it is touched.

    Raises:
        OutputError: it holds anything without the marker, or the marker of another format, or it is a file or a link.
    """
    do = "give another --out, or move this away"
    try:
        if state.exists("") or (isinstance(state, LocalFolder) and state.path.is_symlink()):
            raise OutputError("the folder for the state of the run is a file or a link", state.where, "a folder", do)
        marked = state.exists(MARKER)
        if marked:
            version = _format_of(state.read(MARKER))
            if version != FORMAT:
                raise OutputError(
                    f"the state of a run in format {version}, made by another version of this program",
                    state.where,
                    f"format {FORMAT}",
                    "complete that run with its version, or remove the folder",
                )
        there = set(strangers_in_state(state)) if marked else state.entries()
        if LOCK in there and _LOCKS.fullmatch(state.read(LOCK)):
            there -= {LOCK}
    except StorageError as error:
        raise OutputError(error.what, state.where, do=error.do) from error
    except OSError as error:
        raise OutputError(f"the folder cannot be read: {error.strerror}", state.where, do=do) from error
    if there:
        raise OutputError(
            f"the folder for the state of the run holds something else: {names_of(sorted(there))}",
            state.where,
            "files of a run alone" if marked else f"no such folder, or one with {MARKER}, which every run writes",
            do,
        )


def mark(state: Folder) -> None:
    """Write the marker into the folder of a run's state, once `check_state` has found it free."""
    if not state.exists(MARKER):
        state.write(MARKER, json.dumps({"program": "expert-merging", "format": FORMAT}).encode())


def clear(state: Folder) -> None:
    """Remove the files of a run from the folder of its state, but the lock and the marker. Other files stay.

    The identity goes first, so that a half-removed state is not resumed, and the claim last.
    """
    others = strangers_in_state(state)
    if isinstance(state, LocalFolder):
        names = {path.name for path in state.path.iterdir()} if state.path.is_dir() else set()
    else:
        names = {name.partition("/")[0] for name in state.entries()}
    mixed = {name.partition("/")[0] for name in others}
    names = (names - mixed) | {name for name in state.names() if name.partition("/")[0] in mixed} - set(others)
    for name in sorted(names - {LOCK, MARKER}, key=lambda name: (name != IDENTITY, name == CLAIM, name)):
        state.remove(name)


def is_done(folder: Folder, state: Folder, now: Identity, fresh: bool) -> bool:
    """Return whether the output folder holds this merge and nothing is to be done; see `check_output`."""
    differences: list[str] = []
    try:
        merge, claim = EarlierMerge.read(folder), Claim.read(state)
        allowed = fresh or (claim.allows(merge) and _is_of(state, now))
        if merge is not None and merge.identity is not None and not allowed:
            differences = merge.identity.differences(now)
            if not differences:
                if gone := sorted(merge.files - folder.entries()):
                    what = f"the output folder holds this merge without some of its files: {names_of(gone)}"
                    raise OutputError(what, folder.where, do="restore them, or redo the merge with --fresh")
                return True
        known = merge.files if merge else {*claim.old, *claim.own}
        others = ["."] if folder.exists("") else strangers(folder, known)
        edited = changed_in(folder, merge.written) if merge is not None and allowed else []
    except StorageError as error:
        raise OutputError(error.what, folder.where, do=error.do) from error
    except OSError as error:
        what = f"the output folder cannot be read: {error.strerror}"
        raise OutputError(what, folder.where, do="give another --out") from error
    if merge is not None and not allowed:
        do = "give another --out" if others else "give another --out, or --fresh to replace it"
        what = "the output folder is in use: it holds another merge"
        raise OutputError(f"{what}: {listed(differences, '; ')}" if differences else what, folder.where, do=do)
    if others and merge is not None:
        raise OutputError(
            f"the output folder holds more than the earlier merge, which alone can be replaced: {names_of(others)}",
            folder.where,
            "only files that its merge/config.yaml lists under record: files",
            "move this away, or give another --out",
        )
    if others:
        raise OutputError(
            f"the output folder is in use: it holds something other than a merge: {names_of(others)}",
            folder.where,
            do="give another --out",
        )
    if edited:
        raise OutputError(
            f"the output folder holds files that were changed after the merge: {names_of(edited)}",
            folder.where,
            "the files as the merge wrote them, which alone can be replaced",
            "move them away, or give another --out",
        )
    return False


def resumes(state: Folder, now: Identity, fresh: bool) -> bool:
    """Return whether a run with these results is resumed rather than started anew.

    With `fresh`, only a run that was itself begun with `fresh`: the same command resumes it.

    Raises:
        OutputError: the state is that of another merge, or an input has changed, and not `fresh`.
        DamagedError: the identity of the state is damaged, and not `fresh`.
    """
    try:
        before = read_identity(state)
    except DamagedError:
        if fresh:
            return False
        raise
    if before is None:
        return False
    if fresh and not Claim.read(state).fresh:
        return False
    differences = before.differences(now)
    if not differences:
        return True
    if fresh:
        return False
    if before.options == now.options:
        raise changed(differences, "restore it, or discard the state of the run with --fresh")
    raise OutputError(
        f"the state of another merge into this folder still exists: {listed(differences, '; ')}",
        state.where,
        do="complete that merge, or discard its state with --fresh",
    )


def changed(differences: list[str], do: str) -> InputError:
    """Return the error for inputs that are not those with which the run began."""
    return InputError(f"not as it was when this run began: {listed(differences, '; ')}", "the inputs", do=do)


def read_identity(state: Folder) -> Identity | None:
    """Return the identity in a run's state; None if there is none.

    Raises:
        DamagedError: it is damaged.
    """
    where = f"{state.where}/{IDENTITY}"
    try:
        return decode(read_sealed(state, IDENTITY), where)
    except FileNotFoundError:
        return None
    except (InputError, DamagedError) as error:
        # Without it nothing of the state can be used: no start of the same command computes it again.
        raise DamagedError(error.what, where, do="discard the state of the run with --fresh") from error


def write_identity(state: Folder, identity: Identity) -> None:
    """Store the identity of a run in its state."""
    write_sealed(state, IDENTITY, identity.encode())


def check_replaceable(folder: Folder, claim: Claim) -> None:
    """Check, right before a merge is replaced, that the output's place still holds what the run was started to replace.

    Raises:
        OutputError: it holds something else.
    """
    merge = EarlierMerge.read(folder)
    known, others = set(claim.own), []
    if merge is not None and claim.allows(merge):
        known |= set(claim.old)
        others = changed_in(folder, merge.written)
    others += ["."] if folder.exists("") else strangers(folder, known)
    if others:
        raise OutputError(
            f"the output folder now holds something that this run does not replace: {names_of(others)}",
            folder.where,
            do="move this away, then run the same command to resume",
        )


def remove_files(folder: Folder, names: Collection[str]) -> None:
    """Remove files of a merge: first those that mark a merge and a model, so that a half-removed one is neither."""
    present = folder.entries() & set(names)
    for name in sorted(present, key=lambda name: (name != RECORD, Path(name).name != "config.json", name)):
        folder.remove(name)


def extend_claim(state: Folder, files: Iterable[str]) -> None:
    """Store the names of files before the run writes them in the output's place."""
    claim = Claim.read(state)
    replace(claim, own=tuple({*claim.own, *files})).write(state)


def _is_of(state: Folder, now: Identity) -> bool:
    before = read_identity(state)
    return before is not None and not before.differences(now)


def _recorded_identity(folder: Folder, sha256: Any) -> Identity | None:
    """Return the identity beside a record that names its SHA-256, or None."""
    data = read_bounded(folder, RECORDED_IDENTITY)
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        return None
    try:
        return decode(data, RECORDED_IDENTITY)
    except InputError:
        return None


def _format_of(data: bytes) -> Any:
    try:
        marker = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return marker.get("format") if isinstance(marker, dict) else None


def is_inside(name: str) -> bool:
    """Return whether a name is that of a file inside its folder; a planted record could list `../other`."""
    return bool(name) and "\0" not in name and {"", ".", ".."}.isdisjoint(name.split("/"))
