"""Files of `evaluate`'s results, which are known by a mark in the metadata of the parquet file."""

from __future__ import annotations

import io

from engine.errors import InputError
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.untrusted import library_errors_as

# In the metadata of every file of results.
MARK = {b"expert-merging": b"evaluation"}
# Maximum bytes of a file of results: more than a million rows.
BYTES = 64 << 20


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
