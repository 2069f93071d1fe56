"""What a YAML for a method that learns nothing, in mergekit's forms or ours, says in our keys; and back again.

Whole-model slices become models, a base among the models its settings, `parameters` a recipe of settings, each checked
against the method's options. Knows neither files nor checkpoints.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from engine.config.schema import Config, ListedBase, WeightSpaceSettings
from engine.errors import ConfigError
from engine.methods.options import Method
from engine.methods.registry import INSTALL, MERGEKIT, NAMES, find_method, get_method, known_options
from engine.untrusted import shown

Location = tuple[int | str, ...]


Where = Callable[[Location], str]


# Keys that say how coefficients are learned: kept for a run by a method that learns, and of no use to the others.
LEARNING_KEYS = ("preset", "calibration", "batch_tokens", "gradients", "gradient_checkpointing")


def method_of(raw: dict[str, Any], where: Where) -> Method | None:
    """The method that a config names; None where the name is not even a text, which the config's own check will say.

    Raises:
        ConfigError: there is no such method, or its library is not installed.
    """
    name = raw.get("merge_method")
    if not isinstance(name, str) or not name:
        return None
    method = find_method(name)
    if method is not None:
        return method
    at = where(("merge_method",))
    if name in MERGEKIT:
        raise ConfigError(f"the method {name!r} is mergekit's, which is not installed", at, do=INSTALL)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    raise ConfigError(
        f"there is no method {shown(repr(name))}",
        at,
        do=f"did you mean {near[0]!r}?" if near else "`python cli.py methods` lists them",
    )


def drop_others_options(raw: dict[str, Any], method: Method) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config without the parameters that only other methods have, and their names."""
    others = set(known_options()) - set(method.by_name)
    unused: dict[str, None] = {}

    def kept(section: Any) -> Any:
        if not isinstance(section, dict) or not isinstance(section.get("parameters"), dict):
            return section
        parameters = section["parameters"]
        unused.update(dict.fromkeys(key for key in parameters if key in others))
        return section | {"parameters": {key: value for key, value in parameters.items() if key not in others}}

    found = kept(raw)
    for key in ("models", "slices"):
        if isinstance(found.get(key), list):
            found = found | {key: [kept(one) for one in found[key]]}
    return found, tuple(unused)


def read_recipe(
    raw: dict[str, Any], method: Method, where: Where
) -> tuple[dict[str, Any], WeightSpaceSettings, tuple[str, ...]]:
    """The config in our keys, without parameters; the recipe that these are; and the keys that the method has no use
    for.

    Raises:
        ConfigError: a key that is refused, an option that the method does not have, a value that it does not take.
    """
    raw = _with_tokenizer(dict(raw), where)
    slice_settings: dict[str, Any] = {}
    layers: int | None = None
    if "slices" in raw:
        raw, slice_settings, layers = _whole_slice(raw, where)
    raw, unused = drop_others_options(raw, method)
    unused = (*unused, *(key for key in LEARNING_KEYS if key in raw))
    models: list[Any] = []
    settings: list[dict[str, Any]] = []
    base: ListedBase | None = None
    listed = raw.get("models")
    entries = listed if isinstance(listed, list) else []
    baseless = raw.get("base_model") is None and method.base == "optional" and bool(entries)
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            models.append(entry)
            settings.append({})
            continue
        own = entry.get("parameters") or {}
        _check(own, method, ("models", place, "parameters"), where)
        models.append({key: value for key, value in entry.items() if key != "parameters"})
        if not baseless and entry.get("model") == raw.get("base_model"):
            # Whatever it has of calibration, it is no expert: its task vector would be zero.
            models[-1].pop("calibration", None)
            base = ListedBase(place=place, settings=own)
        else:
            settings.append(own)
    top = raw.pop("parameters", None) or {}
    _check(top, method, ("parameters",), where)
    _check(slice_settings, method, ("slices", 0, "parameters"), where)
    recipe = WeightSpaceSettings(
        models=tuple(settings), top=top, slice=slice_settings, base=base, baseless=baseless, layers=layers
    )
    if baseless and isinstance(models[0], dict):
        raw["base_model"] = models[0].get("model")
    return {"exclude": [], **raw, "models": models} if listed is not None else raw, recipe, unused


def as_yaml(config: Config) -> dict[str, Any]:
    """The config as the keys of a YAML, which read again gives the same config."""
    keys = config.model_dump(mode="json", exclude={"record", "recipe", "unused"}, exclude_none=True)
    recipe = config.recipe
    if recipe is None:
        method = get_method(config.merge_method)
        keys["parameters"] = {key: value for key, value in keys["parameters"].items() if key in method.by_name}
        return keys
    for key in (*LEARNING_KEYS, "parameters"):
        keys.pop(key, None)
    for entry, settings in zip(keys["models"], recipe.models, strict=True):
        entry["parameters"] = settings
        entry.pop("calibration")
    if recipe.base is not None:
        keys["models"].insert(recipe.base.place, {"model": config.base_model, "parameters": recipe.base.settings})
    if recipe.baseless:
        del keys["base_model"]
    keys["parameters"] = recipe.top
    if recipe.slice and recipe.layers is not None:
        sources = [entry | {"layer_range": [0, recipe.layers]} for entry in keys.pop("models")]
        keys["slices"] = [{"sources": sources, "parameters": recipe.slice}]
    return keys


def _check(settings: Any, method: Method, at: Location, where: Where) -> None:
    if not isinstance(settings, dict):
        raise ConfigError(f"{'.'.join(map(str, at))} is {shown(repr(settings))}", where(at), "options and their values")
    for key, setting in settings.items():
        option = method.by_name.get(key)
        if option is None:
            near = difflib.get_close_matches(str(key), [*method.by_name, *known_options()], n=1, cutoff=0.5)
            known = ", ".join(method.by_name) or "none"
            raise ConfigError(
                f"{method.name} has no option {key!r}",
                where((*at, key)),
                do=f"did you mean {near[0]!r}?" if near else f"its options: {known}",
            )
        try:
            option.check(setting)
        except ValueError as error:
            raise ConfigError(f"{'.'.join(map(str, (*at, key)))}: {error}", where((*at, key)), option.about) from error


def _with_tokenizer(raw: dict[str, Any], where: Where) -> dict[str, Any]:
    """`tokenizer: {source: …}` as `tokenizer_source`."""
    given = raw.get("tokenizer")
    if isinstance(given, dict) and set(given) == {"source"} and "tokenizer_source" not in raw:
        del raw["tokenizer"]
        raw["tokenizer_source"] = given["source"]
    if raw.get("tokenizer_source") == "union":
        raise ConfigError(
            "a union of vocabularies is not supported", where(("tokenizer_source",)), "base, or one of the models"
        )
    return raw


def _whole_slice(raw: dict[str, Any], where: Where) -> tuple[dict[str, Any], dict[str, Any], int]:
    """One slice that is the whole of every model, as models."""
    refused = ConfigError(
        "layer-stacking slices are not supported: they make a model of another depth",
        where(("slices",)),
        "one slice, in which every model has the layers 0 to its last",
        "mergekit's passthrough with the same file",
    )
    slices = raw["slices"]
    if "models" in raw:
        raise ConfigError("both `models` and `slices` are given", where(("slices",)), "one of them")
    if not isinstance(slices, list) or not slices or not isinstance(slices[0], dict):
        raise ConfigError("`slices` is no list of slices", where(("slices",)), "[{sources: […]}]")
    sources = slices[0].get("sources")
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources) or not sources:
        raise ConfigError("a slice has no `sources`", where(("slices", 0)))
    ranges = [source.get("layer_range") for source in sources]
    first, last = ranges[0] if isinstance(ranges[0], list) and len(ranges[0]) == 2 else (None, None)
    if type(first) is not int or first != 0 or type(last) is not int or last < 1:
        raise refused
    if len(slices) > 1 or ranges.count(ranges[0]) < len(ranges):
        raise refused
    for key in slices[0]:
        if key not in ("sources", "parameters", "base_model"):
            raise ConfigError(f"unknown key {key!r}", where(("slices", 0, key)), "sources, parameters, base_model")
    raw["models"] = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
    if slices[0].get("base_model") is not None:
        raw["base_model"] = slices[0]["base_model"]
    del raw["slices"]
    return raw, slices[0].get("parameters") or {}, last
