"""mergekit's `models`, `slices` and `modules`: which layers of which models make the output, read from a YAML and back.

All three become slices. `models` is one slice with all layers of every model; `modules` has slices or models for each
part of a model with several, such as the language model of one that takes images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config.recipe import Slice, WeightSpaceSettings
from engine.config.schema import Config
from engine.config.vocabulary import reference
from engine.config.yaml_text import DIGITS, Location, Where, check_keys
from engine.errors import ConfigError
from engine.untrusted import shown

Layers = tuple[int, int] | None

# The most layers of an output.
LAYERS = 10_000

SLICE_KEYS = ("sources", "parameters", "base_model", "merge_method")
MODULE_KEYS = ("slices", "models", "parameters")


@dataclass(frozen=True)
class GivenSlice:
    """A slice of a YAML.

    Attributes:
        entries: Its models as they are given, without `layer_range`.
        layers: The layers of each; None for all.
        places: The place of each in the YAML.
        keys: The other keys of the slice.
        module: The key of `modules` that it belongs to.
        at: The place of the slice in the YAML.
        from_models: Its models are a list of `models`, to which mergekit adds the base.
    """

    entries: list[Any]
    layers: list[Layers]
    places: list[Location]
    keys: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    at: Location = ()
    from_models: bool = False


def given_slices(raw: dict[str, Any], where: Where) -> tuple[list[GivenSlice], dict[str, Any]]:
    """Return the slices that the YAML of a weight-space method describes, and the `parameters` of its modules.

    Raises:
        ConfigError: more than one of `models`, `slices` and `modules` is given, or one of them has not its form.
    """
    given = [key for key in ("modules", "slices", "models") if key in raw]
    if len(given) > 1:
        raise ConfigError(
            f"both `{given[0]}` and `{given[1]}` are given",
            where((given[0],)),
            "one of `models`, `slices` and `modules`",
            "remove the others",
        )
    if given == ["slices"]:
        return _bounded(_slices(raw["slices"], ("slices",), "", where), where), {}
    if given != ["modules"]:
        return _models(raw.get("models"), ("models",), ""), {}
    modules = raw["modules"]
    if not isinstance(modules, dict) or not modules:
        raise ConfigError("`modules` is not a mapping of modules", where(("modules",)), "{default: {slices: […]}}")
    slices: list[GivenSlice] = []
    for name, module in modules.items():
        at: Location = ("modules", name)
        if not isinstance(module, dict) or not {"slices", "models"} & set(module):
            raise ConfigError(
                "the module has neither `slices` nor `models`", where(at), "{slices: […]} or {models: […]}"
            )
        check_keys(module, MODULE_KEYS, at, where)
        if "slices" in module and "models" in module:
            raise ConfigError("the module has both `slices` and `models`", where(at), "one of them", "remove the other")
        key = "slices" if "slices" in module else "models"
        read = (
            _slices(module[key], (*at, key), name, where) if key == "slices" else _models(module[key], (*at, key), name)
        )
        if not read[0].entries:
            raise ConfigError("the module lists no model", where(at), "{models: [{model: …}]}")
        slices += read
    parameters = {name: module.get("parameters") or {} for name, module in modules.items()}
    return _bounded(slices, where), parameters


def _bounded(slices: list[GivenSlice], where: Where) -> list[GivenSlice]:
    """Refuse more layers than any model has: a plan of them would not fit the memory."""
    total = sum(layers[1] - layers[0] for part in slices for layers in part.layers[:1] if layers)
    if total > LAYERS:
        raise ConfigError(
            f"the slices have {total:,} layers",
            where(slices[0].at[:-1]),
            f"at most {LAYERS:,} layers in all",
            "use fewer slices, or shorter ones",
        )
    return slices


def check_whole(raw: dict[str, Any], where: Where) -> None:
    """Check that the YAML of a learned method has neither `slices` nor `modules`.

    Raises:
        ConfigError: it has.
    """
    for key in ("slices", "modules"):
        if key in raw:
            raise ConfigError(
                f"`{key}` is given, but {raw['merge_method']} learns from whole models, which have the base's layers",
                where((key,)),
                "`models`",
                "list the models under `models`, or use a weight-space method",
            )


def check_whole_models(config: Config, where: Where) -> None:
    """Refuse methods that run models on samples, and steps after a merge, where the output has other layers or tokens.

    Raises:
        ConfigError: The config has slices, no base or, where models run, a vocabulary that is not the base's.
    """
    running = [m.name for m in config.methods if m.statistics or m.base_statistics or m.by_blocks]
    running += ["`stats`"] if config.collect else []
    comparing = [*running, *(one.method for one in config.calibrate)]
    recipe = config.recipe
    if not comparing or recipe is None:
        return
    for key, other in (
        ("slices", not recipe.plain),
        ("base_model", recipe.baseless),
        ("tokenizer_source", bool(running) and config.tokenizer_source not in (None, "base")),
    ):
        if other:
            raise ConfigError(
                f"{comparing[0]} compares models with the base, which needs the base's layers and tokens",
                where((key,)),
                "`models` and a `base_model`, without `slices`, `modules` and `tokenizer_source`",
            )


def check_corrections(config: Config, where: Where) -> None:
    """Check that the method and the steps after the merge go together.

    Raises:
        ConfigError: The output is not one model, or two of them solve its layers block by block.
    """
    at = where(("calibrate",))
    if config.calibrate and any(method.outputs == "experts" for method in config.methods):
        raise ConfigError(
            f"{config.merge_method} makes one model per expert, and {config.calibrate[0].method} works on one model", at
        )
    solving = [method.name for method in config.methods if method.by_blocks]
    if len(solving) > 1:
        raise ConfigError(f"{solving[0]} and {solving[1]} both solve the layers block by block", at, "one such step")


def as_slices(config: Config, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `models`, `slices` or `modules` of a config, of which `given_slices` reads the same.

    `entries` has the keys of each expert.
    """
    recipe = config.recipe
    assert recipe is not None
    if recipe.plain:
        return {"models": _sources(config, recipe.slices[0], entries)}
    slices = [_as_slice(config, recipe, part, entries) for part in recipe.slices]
    if not recipe.slices[0].module:
        return {"slices": slices}
    modules: dict[str, Any] = {name: {"parameters": settings} for name, settings in recipe.modules.items()}
    for part, written in zip(recipe.slices, slices, strict=True):
        if all(source.layers is None for source in part.sources):
            modules[part.module]["models"] = written["sources"]
        else:
            modules[part.module].setdefault("slices", []).append(written)
    return {"modules": modules}


def described(recipe: WeightSpaceSettings, names: Sequence[str]) -> list[str]:
    """Return a line for each slice: its layers in the output, and the layers of which models these are.

    `names` are those of the experts.
    """
    lines = []
    counts: Counter[str] = Counter()
    for part in recipe.slices:
        sources = []
        for one in part.sources:
            name = "base" if one.expert is None else names[one.expert]
            sources.append(name if one.layers is None else f"{name}[{one.layers[0]}:{one.layers[1]}]")
        first, given = counts[part.module], part.sources[0].layers
        counts[part.module] += given[1] - given[0] if given else 0
        places = f"layers {first} to {counts[part.module] - 1}" if given else "all layers"
        method = f" by {part.merge_method}" if part.merge_method else ""
        lines.append(f"{part.module + ', ' if part.module else ''}{places}: {', '.join(sources)}{method}")
    return lines


def _as_slice(
    config: Config, recipe: WeightSpaceSettings, part: Slice, entries: list[dict[str, Any]]
) -> dict[str, Any]:
    written: dict[str, Any] = {"sources": _sources(config, part, entries)}
    if part.settings:
        written["parameters"] = part.settings
    if part.merge_method:
        written["merge_method"] = part.merge_method
    if part.base is not None and (recipe.baseless or part.sources[part.base].expert is not None):
        written["base_model"] = written["sources"][part.base]["model"]
    return written


def _sources(config: Config, part: Slice, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sources = []
    for source in part.sources:
        entry: dict[str, Any] = {"model": config.base_model} if source.expert is None else dict(entries[source.expert])
        if source.layers is not None:
            entry["layer_range"] = list(source.layers)
        sources.append(entry | {"parameters": source.settings})
    return sources


def _models(listed: Any, at: Location, module: str) -> list[GivenSlice]:
    """Return the one slice of a list of `models`; without models if it is no list."""
    entries = [_referring(entry) for entry in listed] if isinstance(listed, list) else []
    places: list[Location] = [(*at, index) for index in range(len(entries))]
    return [GivenSlice(entries, [None] * len(entries), places, {}, module, at[:-1], from_models=True)]


def _slices(listed: Any, at: Location, module: str, where: Where) -> list[GivenSlice]:
    if not isinstance(listed, list) or not listed:
        raise ConfigError("`slices` is not a list of slices", where(at), "[{sources: […]}]")
    return [_slice(one, (*at, index), module, where) for index, one in enumerate(listed)]


def _slice(given: Any, at: Location, module: str, where: Where) -> GivenSlice:
    sources = given.get("sources") if isinstance(given, dict) else None
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise ConfigError(
            "the slice has no list of `sources`", where(at), "{sources: [{model: …, layer_range: [0, 8]}]}"
        )
    check_keys(given, SLICE_KEYS, at, where)
    places: list[Location] = [(*at, "sources", index) for index in range(len(sources))]
    layers = [_layers(source, place, where) for source, place in zip(sources, places, strict=True)]
    lengths = [last - first for first, last in layers]
    for length, place in zip(lengths, places, strict=True):
        if length != lengths[0]:
            raise ConfigError(
                f"the model has {length} layers in the slice, the first one {lengths[0]}",
                where((*place, "layer_range")),
                "as many layers of every model of a slice",
                f"give it a `layer_range` of {lengths[0]} layers, or give it a slice of its own",
            )
    entries = [_referring({key: value for key, value in one.items() if key != "layer_range"}) for one in sources]
    keys = {key: reference(value) if key == "base_model" else value for key, value in given.items() if key != "sources"}
    return GivenSlice(entries, list(layers), places, keys, module, at)


def _referring(entry: Any) -> Any:
    return {**entry, "model": reference(entry["model"])} if isinstance(entry, dict) and "model" in entry else entry


def _layers(source: dict[str, Any], at: Location, where: Where) -> tuple[int, int]:
    """Return the first layer of a source and the one after its last."""
    given = source.get("layer_range")
    numbers = [_integer(number) for number in given] if isinstance(given, list) else []
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise ConfigError(
            "the model has no `layer_range`" if given is None else f"`layer_range` is {shown(repr(given))}",
            where((*at, "layer_range")),
            "[first, end], two integers with 0 <= first < end: the layer `end` is not part of the slice",
            "give the numbers of the layers, or list the models under `models` to merge all layers",
        )
    return numbers[0], numbers[1]


def _integer(number: Any) -> int:
    """Return a whole number, which mergekit also takes as a text or a float; -1 for all else."""
    if isinstance(number, str) and number.isdecimal() and len(number) <= DIGITS:
        return int(number)
    whole = isinstance(number, int | float) and not isinstance(number, bool) and number == number // 1
    return int(number) if whole else -1
