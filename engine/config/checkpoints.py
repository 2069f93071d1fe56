"""Models given by a pattern, `run/checkpoint-*`: the folders that match it, in the order of their numbers."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from engine.config.yaml_text import Location, Where
from engine.errors import ConfigError
from engine.storage.paths import is_uri

_NUMBERS = re.compile(r"(\d+)")


def expand(raw: dict[str, Any], folder: Path, where: Where) -> tuple[dict[str, Any], Where]:
    """Replace each entry of `models` whose path is a pattern by an entry for each folder that matches it.

    `*` and `?` stand for any characters or one within a name, `[0-9]` for one of these. The folders are sorted with
    their numbers as numbers: checkpoint-500 is before checkpoint-1000. All other keys of the entry are those of each.

    Args:
        raw: The keys of the config.
        folder: The folder to which paths are relative.
        where: Returns the file and line of a key.

    Returns:
        The keys, and `where` for them.

    Raises:
        ConfigError: No folder matches, or the pattern is a URI.
    """
    models = raw.get("models")
    if not isinstance(models, list):
        return raw, where
    expanded = [(at, one) for at, entry in enumerate(models) for one in _matching(entry, folder, where, at)]
    if len(expanded) == len(models) and all(one is models[at] for at, one in expanded):
        return raw, where
    origins = [at for at, _ in expanded]

    def where_given(location: Location) -> str:
        if location[:1] == ("models",) and len(location) > 1 and int(location[1]) < len(origins):
            location = ("models", origins[int(location[1])], *location[2:])
        return where(location)

    return raw | {"models": [one for _, one in expanded]}, where_given


def _matching(entry: Any, folder: Path, where: Where, at: int) -> list[Any]:
    """Return the entries that an entry of `models` stands for, itself if its path is no pattern."""
    pattern = entry.get("model") if isinstance(entry, dict) else None
    # In a URI, a question mark begins the options of the storage.
    patterned = isinstance(pattern, str) and ("*" in pattern if is_uri(pattern) else glob.has_magic(pattern))
    if not isinstance(pattern, str) or not patterned or "\0" in pattern:
        return [entry]
    if (folder / pattern).exists():  # a folder whose name has such characters
        return [entry]
    place = where(("models", at, "model"))
    if is_uri(pattern):
        raise ConfigError(
            f"the model {pattern!r} is a pattern in object storage",
            place,
            do="list the models one by one; patterns are for folders of a disk",
        )
    found = sorted(glob.glob(pattern, root_dir=folder), key=_with_numbers)  # noqa: PTH207 - relative paths stay so
    folders = [one for one in found if os.path.isdir(folder / one)]  # noqa: PTH112 - false, not an error, for odd names
    if not folders:
        raise ConfigError(f"no folder matches {pattern!r}", place, f"folders below {folder}")
    return [entry | {"model": one} for one in folders]


def _with_numbers(path: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in _NUMBERS.split(path)]
