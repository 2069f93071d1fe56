"""Translate the YAML of a weight-space method, which may use mergekit's forms, to the keys of `Config` and back.

Slices that span the whole model become `models`, a base that is listed among the models becomes a `ListedBase`, and
`parameters` become `WeightSpaceSettings`. Each setting is checked against the options of the method.
"""

from __future__ import annotations

import difflib
from typing import Any

from engine.config.schema import Config, ListedBase, WeightSpaceSettings
from engine.config.yaml_text import Location, Where
from engine.errors import ConfigError
from engine.methods.options import Method
from engine.methods.registry import INSTALL, MERGEKIT, NAMES, find_method, get_method, known_options
from engine.untrusted import shown

# Keys of the learned methods. Weight-space methods ignore them, so that one YAML can serve both.
LEARNING_KEYS = ("preset", "calibration", "batch_tokens", "gradients", "gradient_checkpointing")
# Keys of `cluster` for actors that only a learned merge has.
LEARNING_ACTORS = ("expert", "trainer", "trainers", "factors")


def method_of(raw: dict[str, Any], where: Where) -> Method | None:
    """Return the method that a config names, or None if the name is missing or not a string.

    `Config` reports a missing name and a name that is not a string.

    Raises:
        ConfigError: The method is unknown, or its library is not installed.
    """
    name = raw.get("merge_method")
    if not isinstance(name, str) or not name:
        return None
    method = find_method(name)
    if method is not None:
        return method
    at = where(("merge_method",))
    if name in MERGEKIT:
        raise ConfigError(f"the method {name!r} needs mergekit, which is not installed", at, do=INSTALL)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    raise ConfigError(
        f"unknown method {shown(repr(name))}",
        at,
        do=f"did you mean {near[0]!r}?" if near else "run `python cli.py methods` to list the methods",
    )


def drop_others_options(raw: dict[str, Any], method: Method) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Remove the parameters that only other methods have.

    Returns:
        The config without these parameters, and their names.
    """
    others = set(known_options()) - set(method.by_name)
    unused: dict[str, None] = {}

    def reduced(section: Any) -> Any:
        if not isinstance(section, dict) or not isinstance(section.get("parameters"), dict):
            return section
        parameters = section["parameters"]
        unused.update(dict.fromkeys(key for key in parameters if key in others))
        return section | {"parameters": {key: value for key, value in parameters.items() if key not in others}}

    config = reduced(raw)
    for key in ("models", "slices"):
        if isinstance(config.get(key), list):
            config = config | {key: [reduced(entry) for entry in config[key]]}
    return config, tuple(unused)


def read_recipe(
    raw: dict[str, Any], method: Method, where: Where
) -> tuple[dict[str, Any], WeightSpaceSettings, tuple[str, ...]]:
    """Translate the YAML of a weight-space method to the keys of `Config`.

    Returns:
        The config without `parameters`, the settings that these contain, and the keys that the method does not use.

    Raises:
        ConfigError: A key is not supported, or the method has no such option or refuses its value.
    """
    raw = _with_tokenizer(dict(raw), where)
    slice_settings: dict[str, Any] = {}
    layers: int | None = None
    if "slices" in raw:
        raw, slice_settings, layers = _whole_slice(raw, where)
    raw, unused = drop_others_options(raw, method)
    cluster = raw.get("cluster")
    of_actors = [f"cluster.{key}" for key in LEARNING_ACTORS if isinstance(cluster, dict) and key in cluster]
    unused = (*unused, *(key for key in LEARNING_KEYS if key in raw), *of_actors)
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
        parameters = entry.get("parameters") or {}
        _check(parameters, method, ("models", place, "parameters"), where)
        models.append({key: value for key, value in entry.items() if key != "parameters"})
        if not baseless and entry.get("model") == raw.get("base_model"):
            # Even with calibration files the base is not an expert: its task vector would be zero.
            models[-1].pop("calibration", None)
            base = ListedBase(place=place, settings=parameters)
        else:
            settings.append(parameters)
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
    """Return the config as the keys of a YAML. Reading that YAML gives the same config again."""
    keys = config.model_dump(mode="json", exclude={"record", "recipe", "unused"}, exclude_none=True)
    recipe = config.recipe
    if recipe is None:
        method = get_method(config.merge_method)
        keys["parameters"] = {key: value for key, value in keys["parameters"].items() if key in method.by_name}
        return keys
    for key in (*LEARNING_KEYS, "parameters"):
        keys.pop(key, None)
    keys["cluster"] = {key: value for key, value in keys["cluster"].items() if key not in LEARNING_ACTORS}
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
        name = ".".join(map(str, at))
        raise ConfigError(f"{name} is {shown(repr(settings))}", where(at), "a mapping of options to values")
    for key, setting in settings.items():
        option = method.by_name.get(key)
        if option is None:
            near = difflib.get_close_matches(str(key), [*method.by_name, *known_options()], n=1, cutoff=0.5)
            known = ", ".join(method.by_name) or "none"
            raise ConfigError(
                f"{method.name} has no option {key!r}",
                where((*at, key)),
                do=f"did you mean {near[0]!r}?" if near else f"use the options of the method: {known}",
            )
        try:
            option.check(setting)
        except ValueError as error:
            raise ConfigError(f"{'.'.join(map(str, (*at, key)))}: {error}", where((*at, key)), option.about) from error


def _with_tokenizer(raw: dict[str, Any], where: Where) -> dict[str, Any]:
    """Replace `tokenizer: {source: …}` by `tokenizer_source`."""
    given = raw.get("tokenizer")
    if isinstance(given, dict) and set(given) == {"source"} and "tokenizer_source" not in raw:
        del raw["tokenizer"]
        raw["tokenizer_source"] = given["source"]
    if raw.get("tokenizer_source") == "union":
        raise ConfigError(
            "a union of vocabularies is not supported", where(("tokenizer_source",)), "`base`, or one of the models"
        )
    return raw


def _whole_slice(raw: dict[str, Any], where: Where) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Replace `slices` by `models`, if there is one slice and it spans all layers of every model.

    Returns:
        The config, the `parameters` of the slice, and the number of layers.
    """
    refused = ConfigError(
        "layer-stacking slices are not supported, because they change the depth of the model",
        where(("slices",)),
        "one slice that contains all layers of every model",
        "use `passthrough` of mergekit with the same file",
    )
    slices = raw["slices"]
    if "models" in raw:
        raise ConfigError("both `models` and `slices` are given", where(("slices",)), "one of them")
    if not isinstance(slices, list) or not slices or not isinstance(slices[0], dict):
        raise ConfigError("`slices` is not a list of slices", where(("slices",)), "[{sources: […]}]")
    sources = slices[0].get("sources")
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources) or not sources:
        raise ConfigError("the slice has no list of `sources`", where(("slices", 0)))
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
