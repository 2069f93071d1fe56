"""Read the YAML of a merge into a `Config`, apply `--set` overrides, and check conditions that span several keys.

An unknown key is reported with the nearest known key, and every error has its key and line. The keys are defined in
`engine.config.schema`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel

from engine.config.checkpoints import expand
from engine.config.mergekit_yaml import drop_others_options, method_of, read_recipe
from engine.config.recipe import WeightSpaceSettings
from engine.config.schema import INTERNAL, NAME, UNIONS, Config, ExpertConfig
from engine.config.search.dimensions import check_space
from engine.config.slices import check_corrections, check_whole, check_whole_models
from engine.config.unknown_keys import key_hint, key_paths, known_keys, without_unknown
from engine.config.yaml_text import DEPTH, DIGITS, Location, Where, check_texts, parse, parse_all, set_value
from engine.errors import ConfigError
from engine.methods.learned import ADAMERGING, PRESETS
from engine.methods.options import Statistic
from engine.methods.registry import is_mergekits
from engine.storage.address import addresses_in, check_no_secret
from engine.untrusted import read_text, shown

# The bytes of a config, and the bytes and values of one that a merge recorded, which lists every image with its hash.
BYTES, RECORD_BYTES, RECORD_VALUES = 4 << 20, 32 << 20, 500_000
# `calibration` of every preset and of adamerging: responses are taken from the records and not generated.
AS_GIVEN = {"generate_responses": 0}
Kind = TypeVar("Kind", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = (), strict: bool = False) -> Config:
    """Read the YAML of a merge, apply `--set key.sub=value` overrides, and check all that can be checked in the text.

    Args:
        path: The file.
        overrides: The overrides.
        strict: Refuse keys and parameters that nothing reads, also for the methods of mergekit, which ignores them.

    Raises:
        ConfigError: The file cannot be read or is not valid. Up to five faults are reported at once, each with file,
            line and key.
    """
    raw, node = parse(read_text(path, BYTES, ConfigError, "the config"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError("the config is not a mapping of keys to values", str(path), "keys such as `merge_method: …`")
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, path, node, strict)


def parse_config(raw: dict[str, Any], path: Path, node: yaml.Node | None = None, strict: bool = False) -> Config:
    """Check a config that is already a mapping.

    Args:
        raw: The keys and values.
        path: The file that errors name.
        node: The YAML nodes of the file, from which errors take line numbers. Only with them are texts checked.
        strict: See `load_config`.

    Raises:
        ConfigError: See `load_config`.
    """

    places: list[Location] = []

    def given(location: Location) -> str:
        if location[:1] == ("models",) and len(location) > 1 and places:
            location = (*places[int(location[1])], *location[2:])
        return place_in(path, node, location)

    for key in INTERNAL:
        if key in raw:
            raise ConfigError(f"unknown key {key!r}", given((key,)))
    for location, uri in addresses_in(raw):
        check_no_secret(uri, ConfigError, given(location))
    raw, where = expand(raw, path.absolute().parent, given)
    recipe: WeightSpaceSettings | None = None
    unknown: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    # Names a document of mergekit's files of several merges; on its own it has no effect.
    raw = {key: value for key, value in raw.items() if key != "name"}
    method = method_of(raw, where)
    if method is not None and is_mergekits(method) and not strict:
        raw, unknown = without_unknown(raw, method)
    if node is not None:
        check_texts(raw, where)
    if method is not None:
        raw = raw | {"merge_method": method.name}
        if method.learned:
            check_whole(raw, where)
            raw, unused = drop_others_options(raw, method)
            raw = _with_defaults(raw, method.name)
        else:
            raw, recipe, unused, places = read_recipe(raw, method, where)
    config = validated(Config, raw, path, where)
    config = config.model_copy(update={"recipe": recipe, "unused": (*unused, *unknown)})
    # A learned method's config may list the base among the models, as mergekit's do; `read_recipe` knows it by itself.
    base = config.base_model if config.learned else None
    experts = [(at, one) for at, one in enumerate(config.models) if one.model != base or one.calibration]
    _check(config, experts, where)
    return config.model_copy(update={"models": tuple(expert for _, expert in experts)})


def _with_defaults(raw: dict[str, Any], merge_method: str) -> dict[str, Any]:
    """Return the keys of a config with the defaults of its preset or of its method filled in; given keys win."""
    preset = raw.get("preset")
    if merge_method == "adamerging":
        parameters = ADAMERGING
    elif isinstance(preset, str) and preset in PRESETS:
        parameters = PRESETS[preset]
    else:
        return raw
    defaults = {"parameters": parameters, "calibration": AS_GIVEN}
    sections = {key: raw.get(key) or {} for key in defaults}
    return raw | {key: defaults[key] | given for key, given in sections.items() if isinstance(given, dict)}


def validated(kind: type[Kind], raw: dict[str, Any], path: Path, where: Where) -> Kind:
    """Return the config of keys and values, or raise a `ConfigError` for their faults."""
    try:
        return kind.model_validate(raw)
    except pydantic.ValidationError as error:
        faults = [f for f in error.errors(include_url=False) if f["type"] != "default_factory_not_called"]
        by_location = {_location(fault): fault for fault in reversed(faults)}
        # pydantic often also reports a section that contains a fault as missing or too short: keep the deepest.
        above = {at[:depth] for at in by_location for depth in range(len(at))}
        deepest = [at for at in reversed(by_location) if at not in above]
        errors = [_explain(by_location[at], at, where, kind) for at in deepest]
        if len(errors) == 1:
            raise errors[0] from None
        first = f"{len(errors):,} errors" + (", of which the first 5 are" if len(errors) > 5 else "")
        raise ConfigError("\n".join([first, *map(str, errors[:5])]), str(path)) from None


def _check(config: Config, experts: Sequence[tuple[int, ExpertConfig]], where: Any) -> None:
    """Check conditions that span several keys. `experts`: those in `models`, and their places there."""
    check_corrections(config, where)
    check_whole_models(config, where)
    if config.search is not None:
        check_space(config.search, where)
    if config.learned and not experts:
        raise ConfigError("models lists no expert besides the base", where(("models",)), "at least one expert")
    names: set[str] = set()
    folders = any(method.outputs == "experts" for method in config.methods)
    for index, expert in experts:
        at = where(("models", index))
        if expert.name in names:
            raise ConfigError(
                f"two experts have the name {expert.name!r}",
                at,
                do="give one of them another `name`, which labels it in all outputs",
            )
        names.add(expert.name)
        if expert.statistics and expert.optimizer_state:
            raise ConfigError(
                f"expert {expert.name!r} has both `statistics` and `optimizer_state`, of which one can be used",
                at,
                do="remove one of them; `python cli.py stats --kinds fisher` writes statistics of an `optimizer_state`",
            )
        if folders:
            check_folder_name(expert.name, at)
        if not config.learned:
            _check_data(config, expert, at)
            continue
        weight = config.weight(expert)
        if weight is not None and not 0 < weight < 1:
            raise ConfigError(
                f"the prior of expert {expert.name!r} is {weight}",
                at,
                "a `weight` above 0 and below 1, because the coefficients are sigmoids that start at this value",
            )
        if not expert.calibration:
            raise ConfigError(
                f"expert {expert.name!r} has no calibration file",
                at,
                "`calibration: FILE` with 5–10 unlabelled records of its domain (.json, .jsonl or .parquet)",
            )

    if not config.has_targets and any(config.weight(expert) is None for _, expert in experts):
        raise ConfigError(
            "adamerging cannot search the prior, because it computes no targets",
            where(("parameters", "weight")),
            "a `weight` above 0 and below 1",
        )
    if not config.has_targets and config.calibration.generate_responses:
        raise ConfigError(
            "adamerging cannot generate responses, because it runs no expert",
            where(("calibration", "generate_responses")),
            "`generate_responses: 0`",
        )


def check_folder_name(name: str, where: str) -> None:
    """Check that an expert's name can be that of a folder of the output.

    Raises:
        ConfigError: It cannot.
    """
    odd = re.search(r"[/\\\0]", name) or name.strip(". ") != name or len(name.encode()) > NAME
    if odd or name.lower() in ("merge", "base"):
        raise ConfigError(
            f"the expert's name {shown(repr(name))} cannot be that of a folder of the output",
            where,
            f"a name of at most {NAME} bytes, without slashes and without a dot or a space at its ends, neither "
            "`merge` nor `base`",
            "give the expert another `name`",
        )


def _check_data(config: Config, expert: ExpertConfig, at: str) -> None:
    """Check that an expert of a weight-space method has the data that the method, or a step after it, needs."""
    by_blocks = [method.name for method in config.methods if method.by_blocks]
    collected = [method.name for method in config.methods if not expert.knows(method.statistics) and method.statistics]
    of_base = [method.name for method in config.methods if method.base_statistics and not config.base_statistics]
    needing = [*by_blocks, *collected, *of_base]
    if needing and not expert.calibration:
        folders = ["`statistics: FOLDER`"] if collected else []
        folders += ["`base_statistics: FOLDER`"] if of_base else []
        base = " --base" if of_base else ""
        other = "" if by_blocks else f", or {' and '.join(folders)} from `python cli.py stats{base}`"
        raise ConfigError(
            f"expert {expert.name!r} has no calibration file, and {needing[0]} runs models on samples",
            at,
            f"`calibration: FILE` with records of its domain (.json, .jsonl or .parquet){other}",
        )


def read_recorded(path: Path) -> dict[str, Any]:
    """Return the keys of a merge/config.yaml, its `record` included, for `parse_config`.

    Names of input files may have any characters.

    Raises:
        ConfigError: The file is not a regular file, not YAML, too large, or not a mapping.
    """
    return parse_recorded(read_text(path, RECORD_BYTES, ConfigError, "the recorded config"), str(path))


def parse_recorded(text: str, where: str) -> dict[str, Any]:
    """Return the keys of the text of a merge/config.yaml, as `read_recorded` does; of several documents, the last.

    Raises:
        ConfigError: The text is not YAML, has too many values, or is not a mapping.
    """
    documents = parse_all(text, where, RECORD_VALUES, plain=False)
    raw = documents[-1][0] if documents else None
    if not isinstance(raw, dict):
        raise ConfigError("the recorded config is not a mapping of keys to values", where)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Apply one `key.sub=value`. A number between dots is an index into a list."""
    keys, separator, text = override.partition("=")
    at, names = f"--set {shown(override)}", keys.split(".")
    if not separator or not all(0 < len(name) <= DIGITS for name in names) or len(names) > DEPTH:
        raise ConfigError("not an override", at, "key.sub=value")
    try:
        value, _ = parse(text, "")
        check_texts(value, lambda _: at, tuple(names))
    except ConfigError as error:
        raise ConfigError(error.what, at) from error
    set_value(raw, [int(name) if name.isdecimal() else name for name in names], value, at)


def place_in(path: Path, node: yaml.Node | None, location: Location) -> str:
    """Return the file, and the line of the deepest part of `location` that it has, which errors name."""
    line = _line(node, location)
    return f"{path}:{line}" if line else str(path)


def _line(node: yaml.Node | None, location: Location) -> int | None:
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _location(fault: Any) -> Location:
    """Return the location of a fault, without the names that pydantic adds for the members of a union."""
    parts: Location = fault["loc"]
    return next((parts[: i + 1] for i, part in enumerate(parts) if part in UNIONS), parts)


def _explain(fault: Any, location: Location, where: Any, kind: type[BaseModel]) -> ConfigError:
    """Return the `ConfigError` for a fault that pydantic reports."""
    key = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        known, entry = known_keys(location[:-1], kind), location[:2] if location[0] == "models" else ()
        paths = key_paths(".".join(map(str, entry))) if kind is Config else ()
        hint = key_hint(str(location[-1]), known, paths)
        do = hint or f"use one of these keys: {', '.join(known)}"
        return ConfigError(f"unknown key {key!r}", where(location), do=do)
    if fault["type"] == "missing":
        return ConfigError(f"the key {key!r} is missing", where(location[:-1]))
    # As YAML writes them.
    value = fault["input"]
    given = json.dumps(value) if value is None or isinstance(value, bool) else shown(repr(value))
    message = UNIONS.get(str(location[-1])) if location else None
    message = message or fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return ConfigError(f"{key} is {given}", where(location), message)


def collected(config: Config, kinds: tuple[Statistic, ...], with_base: bool, where: str) -> Config:
    """Return the config of a run that writes statistics of the experts, and of the base if asked, instead of a merge.

    Raises:
        ConfigError: An expert has no calibration file, or a name that no folder can have.
    """
    models = tuple(expert.model_copy(update={"statistics": None}) for expert in config.models)
    update = {"models": models, "base_statistics": None, "calibrate": (), "collect": kinds, "collect_base": with_base}
    made = config.model_copy(update=update)
    check_whole_models(made, lambda at: ".".join([where, *map(str, at)]))
    for expert in models:
        check_folder_name(expert.name, where)
        if not expert.calibration and (with_base or not expert.knows(kinds)):
            raise ConfigError(
                f"expert {expert.name!r} has no calibration file",
                where,
                "`calibration: FILE` with records of its domain (.json, .jsonl or .parquet)",
            )
    return made
