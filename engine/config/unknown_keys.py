"""Unknown keys, parameters and methods: what is meant by them, and their removal where mergekit ignores them.

A key may be misspelt, or right in another section. What nothing reads of a mergekit YAML is left out and listed; the
sections that only this program has (`cluster`, `calibration`) stay strict.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from engine.config.schema import INTERNAL, Config, ExpertConfig
from engine.config.slices import MODULE_KEYS, SLICE_KEYS
from engine.config.vocabulary import TOKEN_KEYS, TOKENIZER_KEYS
from engine.config.yaml_text import Location
from engine.methods.options import Method
from engine.methods.registry import NAMES, find_method, known_options
from engine.untrusted import shown

# The keys of mergekit's sections. `Config` and `ExpertConfig` have those that are not here.
TOP = (*(key for key in Config.model_fields if key not in INTERNAL), "slices", "modules", "tokenizer")
MODEL = tuple(ExpertConfig.model_fields)
SOURCE = (*MODEL, "layer_range")
CONDITION = ("filter", "value")
# How similar a key of the same section must be, from 0 to 1, and a key of another section, which is less likely meant.
HERE, ELSEWHERE = 0.5, 0.75
# How much more similar a key of another section must be than one of the same.
FARTHER = 0.1


def without_unknown(raw: dict[str, Any], method: Method) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Remove the keys and parameters that neither this program nor mergekit reads.

    Returns:
        The config without them, and for each its path in the config with the nearest known key.
    """
    pruned = _Pruned([method, *_methods_of_slices(raw)], _parameters_of(raw))
    return pruned.section(raw, (), TOP), tuple(pruned.found)


class _Pruned:
    """The removal of unknown keys from the sections of one config; `found` describes those that were removed."""

    def __init__(self, methods: Sequence[Method], top: set[str]) -> None:
        self._options = {name for method in methods for name in method.by_name}
        self._known = self._options | set(known_options())
        # mergekit refuses a merge in which one of these has no value.
        required = {option.name for method in methods for option in method.options if option.required}
        self._required = self._options & {"weight", *required} - top
        self.found: list[str] = []

    def section(self, value: Any, at: Location, known: Iterable[str]) -> Any:
        """Return a section without unknown keys, and its own sections alike. What is no mapping stays as it is."""
        of: dict[str, Callable[[Any, Location], Any]] = {
            "parameters": self._parameters,
            "models": lambda inner, place: self._each(inner, place, MODEL),
            "slices": lambda inner, place: self._each(inner, place, SLICE_KEYS),
            "sources": lambda inner, place: self._each(inner, place, SOURCE),
            "modules": lambda inner, place: self._each(inner, place, MODULE_KEYS),
            "tokenizer": lambda inner, place: self.section(inner, place, TOKENIZER_KEYS),
            "tokens": lambda inner, place: self._each(inner, place, TOKEN_KEYS),
        }
        if isinstance(value, dict):
            # A weight beside `parameters` instead of in it: without it, this would be another merge. `Config` refuses.
            known = {*known, *(self._required & value.keys() - _parameters_of(value))}
        kept = self._known_of(value, at, known, self._options)
        if not isinstance(kept, dict):
            return kept
        return {key: of[key](inner, (*at, key)) if key in of else inner for key, inner in kept.items()}

    def _each(self, value: Any, at: Location, known: Iterable[str]) -> Any:
        if isinstance(value, list):
            return [self.section(inner, (*at, index), known) for index, inner in enumerate(value)]
        if isinstance(value, dict):
            return {key: self.section(inner, (*at, key), known) for key, inner in value.items()}
        return value

    def _parameters(self, value: Any, at: Location) -> Any:
        kept = self._known_of(value, at, self._known, ())
        return (
            {key: self._setting(inner, (*at, key)) for key, inner in kept.items()} if isinstance(kept, dict) else kept
        )

    def _setting(self, value: Any, at: Location) -> Any:
        if isinstance(value, list):
            return [self._setting(inner, (*at, index)) for index, inner in enumerate(value)]
        return self._known_of(value, at, CONDITION, ()) if isinstance(value, dict) and "value" in value else value

    def _known_of(self, value: Any, at: Location, known: Iterable[str], options: Iterable[str]) -> Any:
        """Return a mapping without its unknown keys, which may be meant as one of `options`."""
        if not isinstance(value, dict):
            return value
        known = sorted(known)
        for key in (key for key in value if key not in known):
            hint = key_hint(str(key), known, [*(f"parameters.{name}" for name in options), *key_paths()])
            self.found.append(f"{shown('.'.join(map(str, (*at, key))))} (unknown{hint and f'; {hint}'})")
        return {key: inner for key, inner in value.items() if key in known}


def _methods_of_slices(raw: dict[str, Any]) -> list[Method]:
    """Return the methods that slices name for themselves."""
    modules = raw.get("modules")
    parts = [raw, *(modules.values() if isinstance(modules, dict) else [])]
    slices = [part.get("slices") for part in parts if isinstance(part, dict)]
    names = [
        one.get("merge_method") for each in slices if isinstance(each, list) for one in each if isinstance(one, dict)
    ]
    found = (find_method(name) for name in names if isinstance(name, str))
    return [method for method in found if method is not None]


def _parameters_of(section: dict[str, Any]) -> set[str]:
    parameters = section.get("parameters")
    return set(parameters) if isinstance(parameters, dict) else set()


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


def known_keys(location: Location, root: type[BaseModel] = Config) -> list[str]:
    """Return the keys of the section at a place in a config, whose top level is `root`."""
    section = root
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
