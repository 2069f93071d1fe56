"""The marks of scores: of files of `evaluate`'s results, and of the part of a model card that shows scores."""

from __future__ import annotations

import hashlib
import io
import re

from engine.errors import InputError
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.untrusted import library_errors_as

# In the metadata of every file of results.
MARK = {b"expert-merging": b"evaluation"}
# Maximum bytes of a file of results: more than a million rows.
BYTES = 64 << 20
# The line of a model card where its scores will be, and the scores, between two lines of which one has their SHA-256.
NO_SCORES = "<!-- scores -->"
_SCORES = re.compile(r"<!-- scores ([0-9a-f]{64}) -->\n(.*?)\n<!-- end of scores -->", re.DOTALL)


def is_scores(folder: Folder, name: str) -> bool:
    """Return whether this is a file that `evaluate` wrote, which may be replaced. A link is none."""
    from pyarrow.parquet import read_metadata

    if isinstance(folder, LocalFolder) and (folder.path / name).is_symlink():
        return False
    if not folder.exists(name) or folder.size(name) > BYTES:
        return False
    try:
        with library_errors_as(InputError):
            found = read_metadata(io.BytesIO(folder.read(name))).metadata or {}
    except InputError:
        return False
    return MARK.items() <= found.items()


def with_scores(card: str, text: str) -> str:
    """Return a card with scores, in the place of those that it has."""
    section = f"<!-- scores {_digest(text)} -->\n{text}\n<!-- end of scores -->"
    return without_scores(card).replace(NO_SCORES, section, 1)


def without_scores(card: str) -> str:
    """Return a card as it was before scores were added. Scores that somebody changed since are left in it."""
    found = _SCORES.search(card)
    if found is None or _digest(found[2]) != found[1]:
        return card
    return f"{card[: found.start()]}{NO_SCORES}{card[found.end() :]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
