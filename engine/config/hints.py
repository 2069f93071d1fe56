"""What a user may have meant by a key or a method that does not exist: misspelt, or right but in another place."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from engine.config.schema import INTERNAL, Config
from engine.config.yaml_text import Location
from engine.methods.registry import NAMES

# How similar a key of the same section must be, from 0 to 1, and a key of another section, which is less likely meant.
HERE, ELSEWHERE = 0.5, 0.75
# How much more similar a key of another section must be than one of the same.
FARTHER = 0.1


def key_hint(key: str, here: Collection[str], elsewhere: Iterable[str]) -> str:
    """Return a question that names the key for which an unknown key may stand, or an empty text.

    Args:
        key: The unknown key.
        here: The keys of its section.
        elsewhere: Keys of other sections with their sections, such as `parameters.epochs`.
    """
    found = [(_likeness(key, name), name) for name in here]
    near = [(likeness, name) for likeness, name in found if likeness >= HERE]
    found = [(_likeness(key, path.rpartition(".")[2]), path) for path in elsewhere]
    near += [(likeness - FARTHER, path) for likeness, path in found if likeness >= ELSEWHERE]
    if not near:
        return ""
    meant = max(near, key=lambda one: one[0])[1]  # of equally similar ones the first
    return f"did you mean {meant!r}{'' if meant in here or '.' in meant else ' at the top level'}?"


def nearest_method(name: str) -> str | None:
    """Return the method that an unknown name may stand for, such as `expert_merging_pp` for `Expert Merging++`."""
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower().replace("++", "_pp"))
    return next(iter(difflib.get_close_matches(plain, NAMES, n=1, cutoff=HERE)), None)


def known_keys(location: Location) -> list[str]:
    """Return the keys of the section at a place in a config."""
    section: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return [name for name in section.model_fields if name not in INTERNAL]


@cache
def key_paths(entry: str = "") -> tuple[str, ...]:
    """Return all keys of a config with their sections, those of an entry of `models` first if `entry` is its place."""
    in_entries = (path for path in _paths(Config, "", lists=True) if path.startswith("models."))
    return (*(path.replace("models", entry, 1) for path in in_entries if entry), *_paths(Config, ""))


def _paths(section: type[BaseModel], at: str, lists: bool = False) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if name in INTERNAL:
            continue
        yield f"{at}{name}"
        if lists or get_origin(field.annotation) is not tuple:
            for inner in _sections(field.annotation):
                yield from _paths(inner, f"{at}{name}.", lists)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the config sections that a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (tuple, Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _sections(argument)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, one).ratio()
