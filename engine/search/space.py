"""The space of a search: the keys of a config that trials vary, and the config of a trial."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config.documents import Document
from engine.config.schema import Config
from engine.config.search.dimensions import Dimension, names_of, read_dimension
from engine.config.search.settings import Search, Value
from engine.config.yaml_text import set_value
from engine.errors import ConfigError

Place = tuple[int | str, ...]
METHOD = "merge_method"


@dataclass(frozen=True)
class Space:
    """The keys that trials vary, by their names in the table of trials.

    Attributes:
        document: The config, without its `search`.
        places: Where the value of each key stands in the config.
        dimensions: The values of each key.
    """

    document: Document
    places: Mapping[str, Place]
    dimensions: Mapping[str, Dimension]

    @classmethod
    def of(cls, document: Document, search: Search) -> Space:
        """Return the space that a config declares.

        Raises:
            ConfigError: A * stands for nothing, or two keys of the space are one key of the config.
        """
        raw = {key: value for key, value in document.raw.items() if key != "search"}
        places: dict[str, Place] = {}
        dimensions: dict[str, Dimension] = {}
        for key, given in search.space.items():
            at = f"{document.path}: search.space"
            found = list(_places(raw, names_of(key), ()))
            if not found:
                what = f"the * of {key!r} stands for nothing in the config"
                raise ConfigError(what, at, "a list or a mapping that the config has")
            for place in found:
                name = ".".join(map(str, place))
                if name in places:
                    what = f"two keys of the space are the key {name!r} of the config"
                    raise ConfigError(what, at, do="remove one of them")
                places[name], dimensions[name] = place, read_dimension(given, key, at)
        return cls(replace(document, raw=raw), places, dimensions)

    def raw(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """Return the keys of the config with these values, by the names of `places`.

        Raises:
            ConfigError: The config has no place for one.
        """
        raw = copy.deepcopy(self.document.raw)
        for name, value in values.items():
            set_value(raw, self.places[name], value, f"{self.document.path}: search.space: {name}")
        return raw

    def config(self, values: Mapping[str, Value]) -> Config:
        """Return the config of a trial with these values.

        Raises:
            ConfigError: The values do not go together, or are none of their options.
        """
        return replace(self.document, raw=self.raw(values)).config({})

    def given(self) -> dict[str, Value] | None:
        """Return the values that the config itself has; None if it lacks one, or one is outside of the space."""
        values: dict[str, Value] = {}
        for name, place in self.places.items():
            found: Any = self.document.raw
            for key in place:
                try:
                    found = found[key]
                except (KeyError, IndexError, TypeError):
                    return None
            if not self.dimensions[name].has(found):
                return None
            values[name] = found
        return values

    def check(self) -> None:
        """Check that each value at an end of a range, and each choice, makes a config, and that each key matters.

        Raises:
            ConfigError: A config is not valid, or no method of the space uses a key.
        """
        first = {name: one.ends[0] for name, one in self.dimensions.items()}
        methods = [name for name in self.places if name.endswith(METHOD)]
        starts = [first, *(first | {name: one} for name in methods for one in self.dimensions[name].choices)]
        configs = [_without_unused(self.config(start)) for start in starts]
        for name, dimension in self.dimensions.items():
            used = False
            for value in dimension.choices or dimension.ends:
                for start, before in zip(starts, configs, strict=True):
                    used |= _without_unused(self.config(start | {name: value})) != before
            if not used:
                raise ConfigError(
                    f"the key {name!r} of the space changes nothing",
                    f"{self.document.path}: search.space",
                    "an option of the method",
                    "see `python cli.py methods` for the options of each",
                )


def check_method(config: Config, where: str) -> None:
    """Check that the merge of a trial can be streamed from the weights alone.

    Raises:
        ConfigError: It runs models, or has several outputs.
    """
    if config.learned:
        what = f"{config.merge_method} learns its coefficients, and a search proposes them"
        raise ConfigError(what, where, "a weight-space method", "set another `merge_method`, such as task_arithmetic")
    if config.uses_samples:
        needing = next(method.name for method in config.methods if method.runs_models)
        raise ConfigError(
            f"{needing} runs models on samples for each merge, and a trial merges from weights alone",
            where,
            "a method without statistics, or `statistics: FOLDER` of every model",
            "write them once with `python cli.py stats`, if the method does not solve block by block",
        )
    several = next((method.name for method in config.methods if method.outputs == "experts"), None)
    if several is not None:
        raise ConfigError(f"{several} has an output for each expert", where, "a method with one merged model")


def _without_unused(config: Config) -> Config:
    return config.model_copy(update={"unused": ()})


def _places(value: Any, names: tuple[str, ...], at: Place) -> Iterator[Place]:
    """Yield the places in a config that a key with * means, each once."""
    if not names:
        yield at
        return
    name, rest = names[0], names[1:]
    if name == "*":
        keys: list[int | str] = list(range(len(value))) if isinstance(value, list) else []
        keys = list(value) if isinstance(value, dict) else keys
        for key in keys:
            yield from _places(value[key], rest, (*at, key))
        return
    key = int(name) if name.isdecimal() else name
    try:
        inner = value[key]
    except (KeyError, IndexError, TypeError):
        inner = None
    yield from _places(inner, rest, (*at, key))
