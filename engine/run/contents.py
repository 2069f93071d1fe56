"""The files of a run's state and of an output: which are this program's own, by name and by content.

A file of another name, or one that was changed since, is somebody else's work, and is neither removed nor replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from engine.checkpoints.find import CARD
from engine.errors import DamagedError, InputError
from engine.run.identity import InputFile
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder, digest
from engine.storage.scores import without_scores
from engine.storage.sealed import digest_name, read_sealed
from engine.untrusted import listed, parse_json

# Size, SHA-256 and time of every file of an output but itself, by name.
MANIFEST = "merge/files.json"
# Rewritten by `report` and `evaluate`, which know their own files by marks.
REWRITTEN = {"merge/report.html", "merge/evaluation.parquet"}
# The names of all files of a run's state, and the folders in it.
_STATE = re.compile(
    r"lock|expert-merging-run\.json|(identity|claim|plan|samples|devices|reused|left-out|doubts)\.json|name|writing|log(\.1)?"
    r"|(magnitudes|base|prior|end-check|stage-\d+)\.safetensors|(targets|inputs)/\d+-\d+\.safetensors"
    r"|orthogonal/[0-9a-f]{64}\.safetensors|parts/\d+-\d+\.safetensors|survey/\d+-\d+\.json|metrics/\d+-\d+\.json"
    r"|statistics/(?:\d+|base)(?:/statistics\.json|/(?:moments|fisher|sensitivity)-\d{5}\.safetensors)?"
    r"|(merged|calibrated/solved)/[0-9a-f]{64}\.safetensors|calibrated/parts|calibrated/tokens/\d+\.safetensors"
    r"|calibrated/streams/\d+-\d+\.safetensors|calibrated/(shares(/\d+)?|streams|solved|tokens)"
    r"|calibrated/shares/\d+/\d+(-[0-9a-f]{64}\.safetensors|\.json)"
    r"|compressed/\d+\.safetensors|starts/\d+\.json|rounding/.+\.json|(digests|output|replaced)/.+"
)
_FOLDERS = {
    *("targets", "inputs", "orthogonal", "parts", "survey", "metrics", "statistics"),
    *("starts", "rounding", "digests", "output", "replaced", "merged", "calibrated", "compressed"),
}
# Maximum bytes of a file about an output, and of a file in object storage whose content is compared.
_BYTES, _SMALL = 32 << 20, 1 << 20


def strangers(folder: Folder, known: Collection[str]) -> list[str]:
    """Return what a folder holds besides the known files, sorted; the folders of known files do not count."""
    parents = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    return sorted(folder.entries() - set(known) - parents)


def strangers_in_state(state: Folder) -> list[str]:
    """Return what the folder of a run's state holds besides files of a run, sorted."""
    return sorted(name for name in state.entries() if name not in _FOLDERS and not _STATE.fullmatch(name))


def write_manifest(composed: LocalFolder, weights: Folder, state: Folder, names: Collection[str]) -> None:
    """Write the manifest of an output into its folder of all files but the weights.

    Args:
        composed: That folder.
        weights: The folder of the weight files, which may be the same.
        state: The state of the run, which holds the SHA-256 of the weight files.
        names: The names of the weight files.
    """
    here = composed.names() - {MANIFEST}
    files = {name: _stored(composed, name, _known_digest(state, name)) for name in here}
    files |= {name: _stored(weights, name, _known_digest(state, name)) for name in set(names) - here}
    text = json.dumps({name: file.encode() for name, file in sorted(files.items())}, indent=0)
    composed.write(MANIFEST, text.encode())


def read_bounded(folder: Folder, name: str) -> bytes | None:
    """Return the content of a file of an output, or None if it is absent, no regular file, or too large.

    The folder may be anybody's: a pipe would never end.
    """
    return folder.read(name) if folder.exists(name) and folder.size(name) <= _BYTES else None


def read_manifest(folder: Folder) -> dict[str, InputFile]:
    """Return the files of an output as they were written; none if it has no valid manifest."""
    data = read_bounded(folder, MANIFEST)
    try:
        raw = parse_json(data.decode(), MANIFEST, InputError) if data is not None else {}
        return {name: InputFile.decode(text) for name, text in raw.items()}
    except (InputError, ValueError, AttributeError):
        return {}


def changed_in(folder: Folder, written: Mapping[str, InputFile]) -> list[str]:
    """Return the names of the files that are not as they were written, sorted. Files that are gone do not count.

    On a disk, a file of another time is hashed. In object storage, small files are; of others the size counts.
    """
    there = folder.entries()
    names = (name for name in written if name in there and name not in REWRITTEN)
    return sorted(name for name in names if not is_as_written(folder, name, written[name]))


def names_of(names: Sequence[str]) -> str:
    """Return the first names for a message, and the number of the others."""
    return listed([repr(name if len(name) <= 200 else f"{name[:200]}…") for name in names])


def is_as_written(folder: Folder, name: str, written: InputFile) -> bool:
    """Return whether a file of an output is as it was written; see `changed_in`. Scores in a card do not count."""
    return _is_same(folder, name, written) or (name == CARD and _without_scores(folder) == written.sha256)


def _without_scores(folder: Folder) -> str | None:
    """Return the SHA-256 of an output's card without its scores; None if there is no card, or a link."""
    if isinstance(folder, LocalFolder) and (folder.path / CARD).is_symlink():
        return None
    data = read_bounded(folder, CARD)
    if data is None:
        return None
    card = without_scores(data.decode(errors="surrogateescape"))
    return hashlib.sha256(card.encode(errors="surrogateescape")).hexdigest()


def _is_same(folder: Folder, name: str, written: InputFile) -> bool:
    if isinstance(folder, LocalFolder):
        path = folder.path / name
        if path.is_symlink() or not path.is_file():
            return False
        found = path.stat()
        return InputFile(found.st_size, (found.st_mtime_ns,), None, path).is_as(written)
    if folder.size(name) != written.size:
        return False
    if written.sha256 is None or written.size > _SMALL:
        return True
    return hashlib.sha256(folder.read(name)).hexdigest() == written.sha256


def _stored(folder: Folder, name: str, sha256: str | None) -> InputFile:
    if not isinstance(folder, LocalFolder):
        return InputFile(folder.size(name), (), sha256)
    path = folder.path / name
    found = path.stat()
    return InputFile(found.st_size, (found.st_mtime_ns,), sha256 or digest(path))


def _known_digest(state: Folder, name: str) -> str | None:
    """Return the SHA-256 of a weight file, which its shard stored."""
    try:
        return read_sealed(state, digest_name(f"output/{name}")).decode()
    except (FileNotFoundError, DamagedError):
        return None
