"""A merge's YAML read into a `Config`, with `--set` overrides and checks of what one key alone cannot show.

Reads and checks text only: unknown keys fail with the nearest known key, and every error carries its key and line. The
keys themselves are `engine.config.schema`'s. Knows nothing of checkpoints, torch or Ray.
"""

from __future__ import annotations

import difflib
import types
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import (
    BaseModel,
)

from engine.config.mergekit_yaml import drop_others_options, method_of, read_recipe
from engine.config.schema import INTERNAL, UNIONS, Config, ExpertConfig, WeightSpaceSettings
from engine.errors import ConfigError
from engine.methods.learned import ADAMERGING, PAPER
from engine.untrusted import read_text, shown

AS_GIVEN = {"generate_responses": 0}


def with_defaults(raw: dict[str, Any], merge_method: str) -> dict[str, Any]:
    """A config's keys with the defaults of its preset, or those that its method alone has."""
    if merge_method == "adamerging":
        parameters = ADAMERGING
    elif raw.get("preset") == "paper":
        parameters = PAPER
    else:
        return raw
    given = {"parameters": parameters, "calibration": AS_GIVEN}
    sections = {key: raw.get(key) or {} for key in given}
    return raw | {key: given[key] | own for key, own in sections.items() if isinstance(own, dict)}


Location = tuple[int | str, ...]


# Bytes of a config; values in it, each alias counted as all that it stands for; how deep they may stand in each other;
# characters of one value, as long as a path can be, and of one number.
BYTES, VALUES, DEPTH, TEXT, DIGITS = 4 << 20, 100_000, 40, 4096, 1000


# Categories of characters that make a name another than it looks, or steer a terminal: control, format, surrogate,
# line and paragraph separators.
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


MERGE = "tag:yaml.org,2002:merge"


KEYS = {"tag:yaml.org,2002:str", MERGE}


class _Loader(yaml.SafeLoader):
    """Safe YAML of bounded size, in which a key given twice is an error, not a silent overwrite."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        # Values that a node stands for, itself included; 0 while it is not done.
        self._sizes: dict[yaml.Node, int] = {}
        self._total = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _fault(f"a tag ({shown(event.tag)}); values are of the kinds that need none", event)
        if self._depth == DEPTH:
            raise _fault("it is nested too deeply", event)
        self._depth += 1
        before = self._total
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise _fault(f"the alias {event.anchor!r} stands for what it is part of", event)
            self._total += self._sizes[node]
        else:
            self._total += 1
            self._sizes[node] = self._total - before
        if self._total > VALUES:
            raise _fault(f"more than {VALUES:,} values", event)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if len(node.value) > (DIGITS if node.tag in NUMBERS else TEXT):
            raise _fault(f"a value of {len(node.value):,} characters", node)
        unseen = next((char for char in node.value if unicodedata.category(char) in INVISIBLE), None)
        if unseen is not None:
            raise _fault(f"a text with the character {unseen!r}", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in KEYS:
                raise _fault("a key is not a text", key)
            if key.value in seen and key.tag != MERGE:
                raise _fault(f"the key {key.value!r} is given twice", key)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a merge's YAML, apply `--set key.sub=value` overrides and check everything that text alone can show.

    Raises:
        ConfigError: with file, line and key; up to five faults at once.
    """
    raw, node = _parse(read_text(path, BYTES, ConfigError, "the config"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError("the config is not a mapping of keys to values", str(path), "merge_method: … and so on")
    for override in overrides:
        _override(raw, override)
    return parse_config(raw, path, node)


def parse_config(raw: dict[str, Any], path: Path, node: yaml.Node | None = None) -> Config:
    """Check a config that is already a mapping; `path` and `node` tell where a fault stands."""

    def where(location: Location) -> str:
        line = _line(node, location)
        return f"{path}:{line}" if line else str(path)

    for key in INTERNAL:
        if key in raw:
            raise ConfigError(f"unknown key {key!r}", where((key,)))
    recipe: WeightSpaceSettings | None = None
    unused: tuple[str, ...] = ()
    method = method_of(raw, where)
    if method is not None:
        raw = raw | {"merge_method": method.name}
        if method.learned:
            raw, unused = drop_others_options(raw, method)
            raw = with_defaults(raw, method.name)
        else:
            raw, recipe, unused = read_recipe(raw, method, where)
    try:
        config = Config.model_validate(raw)
    except pydantic.ValidationError as error:
        faults = [f for f in error.errors(include_url=False) if f["type"] != "default_factory_not_called"]
        found = {_location(fault): fault for fault in reversed(faults)}
        # A section with a fault in it is often reported as missing or short as well: only the deepest is the user's.
        above = {at[:depth] for at in found for depth in range(len(at))}
        deepest = [at for at in reversed(found) if at not in above]
        told = [str(_explain(found[at], at, where)) for at in deepest[:5]]
        more = [f"({len(deepest) - 5} more)"] if len(deepest) > 5 else []
        raise ConfigError("\n".join(told + more)) from None
    config = config.model_copy(update={"recipe": recipe, "unused": unused})
    _check(config, where)
    return config.model_copy(
        update={"models": tuple(expert for expert in config.models if not _is_base(config, expert))}
    )


def _check(config: Config, where: Any) -> None:
    """What one key alone cannot show."""
    experts = [(index, expert) for index, expert in enumerate(config.models) if not _is_base(config, expert)]
    if not experts:
        raise ConfigError("`models` has no expert beside the base", where(("models",)))
    names: set[str] = set()
    for index, expert in experts:
        at = where(("models", index))
        if expert.name in names:
            raise ConfigError(
                f"two experts are called {expert.name!r}",
                at,
                do="give one of them another `name`; names label the outputs",
            )
        names.add(expert.name)
        if not config.learned:
            continue
        weight = config.weight(expert)
        if weight is not None and not 0 < weight < 1:
            raise ConfigError(
                f"the prior of expert {expert.name!r} is {weight}",
                at,
                "a `weight` above 0 and below 1: coefficients are learned through a sigmoid that starts there",
            )
        if not expert.calibration:
            raise ConfigError(
                f"expert {expert.name!r} has no calibration",
                at,
                "`calibration: FILE` with 5–10 unlabelled records of its domain (.json, .jsonl or .parquet)",
            )

    if not config.has_targets and any(config.weight(expert) is None for _, expert in experts):
        raise ConfigError(
            "no expert says what adamerging's prior should be",
            where(("parameters", "weight")),
            "a `weight` above 0 and below 1",
        )
    if not config.has_targets and config.calibration.generate_responses:
        raise ConfigError(
            "no expert answers for adamerging",
            where(("calibration", "generate_responses")),
            "calibration without generate_responses",
        )


def _parse(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The value that a YAML text is, and its nodes."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return loader.construct_document(node) if node is not None else None, node
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"not valid YAML: {what}", f"{where}:{mark.line + 1}" if mark else where) from error


def _fault(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """What is wrong at an event or a node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `key.sub=value`; a number between dots is an index into a list."""
    keys, separator, text = override.partition("=")
    at, names = f"--set {shown(override)}", keys.split(".")
    if not separator or not all(0 < len(name) <= DIGITS for name in names) or len(names) > DEPTH:
        raise ConfigError("not an override", at, "key.sub=value")
    try:
        value, _ = _parse(text, "")
    except ConfigError as error:
        raise ConfigError(error.what, at) from error
    target: Any = raw
    *parents, last = (int(name) if name.isdecimal() else name for name in names)
    for key in parents:
        if isinstance(target, dict) and isinstance(key, str):
            target = target.setdefault(key, {})
        elif isinstance(target, list) and isinstance(key, int) and key < len(target):
            target = target[key]
        else:
            raise ConfigError(f"there is no {key!r} to set a value in", at)
    try:
        target[last] = value
    except (TypeError, IndexError) as error:
        raise ConfigError(f"there is no {last!r} to set", at) from error


def _line(node: yaml.Node | None, location: Location) -> int | None:
    """The line, from 1, of the deepest part of `location` that the file has."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config sections that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (tuple, Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _sections(argument)


def _known_keys(location: Location) -> list[str]:
    """The keys that the section at `location` has."""
    section: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return [name for name in section.model_fields if name not in INTERNAL]


def _location(fault: Any) -> Location:
    """Where a fault stands, without the names that pydantic adds for the members of a union."""
    parts: Location = fault["loc"]
    return next((parts[: i + 1] for i, part in enumerate(parts) if part in UNIONS), parts)


def _is_base(config: Config, expert: ExpertConfig) -> bool:
    """Whether the entry is the base, which mergekit's users list among the models."""
    if config.recipe is not None and config.recipe.baseless:
        return False
    return expert.model == config.base_model and not expert.calibration


def _explain(fault: Any, location: Location, where: Any) -> ConfigError:
    """One of pydantic's faults in our words."""
    key = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        do = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        return ConfigError(f"unknown key {key!r}", where(location), do=do)
    if fault["type"] == "missing":
        return ConfigError(f"the key {key!r} is missing", where(location[:-1]))
    given = shown(repr(fault["input"]))
    message = UNIONS.get(str(location[-1])) if location else None
    message = message or fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return ConfigError(f"{key} is {given}", where(location), message)
