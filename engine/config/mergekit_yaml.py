"""Translate the YAML of a weight-space method, which may use mergekit's forms, to the keys of `Config` and back.

`models`, `slices` and `modules` become slices, of which `Config.models` has each expert once, and `parameters` become
`WeightSpaceSettings`. Each setting is checked against the options of the method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from engine.config.recipe import Slice, Source, WeightSpaceSettings
from engine.config.schema import INTERNAL, Config, last_part
from engine.config.slices import GivenSlice, as_slices, given_slices
from engine.config.unknown_keys import key_hint, key_paths, nearest_method
from engine.config.vocabulary import TokenSettings, read_tokens, reference, tokenizer_yaml, with_tokenizer_source
from engine.config.yaml_text import Location, Where
from engine.errors import ConfigError
from engine.methods.corrections import CORRECTIONS
from engine.methods.options import Method
from engine.methods.registry import INSTALL, MERGEKIT, find_method, get_method, known_options
from engine.untrusted import shown

# Keys that only the configs of mergekit-moe have.
MOE_KEYS = ("gate_mode", "experts", "shared_experts")
# Keys of the learned methods. Weight-space methods ignore them, so that one YAML can serve both. Those that run models
# on samples have SAMPLE_KEYS and SAMPLE_ACTORS.
LEARNING_KEYS = ("preset", "calibration", "batch_tokens", "gradients", "gradient_checkpointing")
# Keys of `cluster` for actors that only a learned merge has.
LEARNING_ACTORS = ("expert", "trainer", "trainers", "factors")
SAMPLE_KEYS, SAMPLE_ACTORS = ("calibration",), ("expert",)


def method_of(raw: dict[str, Any], where: Where) -> Method | None:
    """Return the method that a config names, or None if the name is missing or not a string.

    `Config` reports a missing name and a name that is not a string.

    Raises:
        ConfigError: The method is unknown, or its library is not installed; or this is no merge, but the construction
            of a mixture of experts by mergekit-moe.
    """
    name = raw.get("merge_method")
    built = next((key for key in MOE_KEYS if key in raw and name is None), None)
    if built is not None:
        raise ConfigError(
            "a config of mergekit-moe, which builds a model of another architecture from whole models",
            where((built,)),
            "a `merge_method`",
            "run `mergekit-moe CONFIG FOLDER`; its outputs can be merged with each other",
        )
    if not isinstance(name, str) or not name:
        return None
    method = find_method(name)
    if method is not None:
        return method
    at = where(("merge_method",))
    if name in MERGEKIT:
        raise ConfigError(f"the method {name!r} needs mergekit, which is not installed", at, do=INSTALL)
    near = nearest_method(name)
    raise ConfigError(
        f"unknown method {shown(repr(name))}",
        at,
        do=f"did you mean {near!r}?" if near else "run `python cli.py methods` to list the methods",
    )


def drop_others_options(raw: dict[str, Any], *methods: Method) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Remove the parameters that only methods other than these have.

    Returns:
        The config without these parameters, and their names.
    """
    others = set(known_options()).difference(*(method.by_name for method in methods))
    unused: dict[str, None] = {}

    def reduced(section: Any) -> Any:
        if not isinstance(section, dict) or not isinstance(section.get("parameters"), dict):
            return section
        parameters = section["parameters"]
        unused.update(dict.fromkeys(key for key in parameters if key in others))
        return section | {"parameters": {key: value for key, value in parameters.items() if key not in others}}

    config = reduced(raw)
    if isinstance(config.get("models"), list):
        config = config | {"models": [reduced(entry) for entry in config["models"]]}
    return config, tuple(unused)


def read_recipe(
    raw: dict[str, Any], method: Method, where: Where
) -> tuple[dict[str, Any], WeightSpaceSettings, tuple[str, ...], list[Location]]:
    """Translate the YAML of a weight-space method to the keys of `Config`.

    Returns:
        The config without `parameters`, the settings that these contain, the keys that the method does not use, and the
        place in the YAML of each of the config's `models`.

    Raises:
        ConfigError: A key is not supported, or the method has no such option or refuses its value.
    """
    raw, tokenizer = with_tokenizer_source(raw, where)
    given, module_settings = given_slices(raw, where)
    if not given[0].entries:
        raise ConfigError("`models` lists no model", where(("models",)), "[{model: …}, …]")
    experts = _Experts(reference(raw.get("base_model")), given, method)
    slices, methods = [], [method]
    unused: list[str] = []
    for part in given:
        own = _method_of_slice(part, method, where)
        methods.append(own)
        reduced, dropped = drop_others_options({"models": part.entries, **part.keys}, own)
        unused += dropped
        settings = reduced.get("parameters") or {}
        _check(settings, [own], (*part.at, "parameters"), where)
        for entry, place in zip(reduced["models"], part.places, strict=True):
            if isinstance(entry, dict):
                _check(entry.get("parameters") or {}, [own], (*place, "parameters"), where)
        slices.append(experts.slice(part, reduced["models"], settings, own, where))
    top, dropped = drop_others_options({"parameters": raw.pop("parameters", None) or {}}, *methods)
    _check(top["parameters"], methods, ("parameters",), where)
    modules = {}
    for name, settings in module_settings.items():
        of_module, more = drop_others_options({"parameters": settings}, *methods)
        modules[name], dropped = of_module["parameters"], (*dropped, *more)
        _check(modules[name], methods, ("modules", name, "parameters"), where)
    cluster = raw.get("cluster")
    with_samples = runs_models(methods, raw.get("calibrate"))
    keys, actors = _learning_keys(with_samples)
    of_actors = [f"cluster.{key}" for key in actors if isinstance(cluster, dict) and key in cluster]
    unused += [*dropped, *(key for key in keys if key in raw), *of_actors]
    if not with_samples:
        named = {key for model in experts.models if isinstance(model, dict) for key in model}
        unused += [f"models[].{key}" for key in ("statistics", "optimizer_state") if key in named]
        unused += ["base_statistics"] if "base_statistics" in raw else []
    tokens = read_tokens(tokenizer, reference(raw.get("base_model")), experts.models, where)
    recipe = WeightSpaceSettings(
        slices=tuple(slices), modules=modules, top=top["parameters"], baseless=experts.baseless, tokens=tokens
    )
    rest = {key: value for key, value in raw.items() if key not in ("slices", "modules")}
    base = {} if experts.base is None else {"base_model": experts.base}
    return (
        {"exclude": [], **rest, **base, "models": experts.models},
        recipe,
        tuple(dict.fromkeys(unused)),
        experts.places,
    )


def runs_models(methods: Iterable[Method], calibrate: Any) -> bool:
    """Return whether one of the methods, or a step of `calibrate` as it is given, may run models on samples."""
    steps = calibrate if isinstance(calibrate, list) else [calibrate]
    names = [step.get("method") if isinstance(step, dict) else step for step in steps]
    after = [CORRECTIONS[name] for name in names if isinstance(name, str) and name in CORRECTIONS]
    return any(method.runs_models for method in (*methods, *after))


def _learning_keys(with_samples: bool) -> tuple[list[str], list[str]]:
    """Return the keys of learned methods that a weight-space method does not read, and those of `cluster`."""
    kept = (*SAMPLE_KEYS, *SAMPLE_ACTORS) if with_samples else ()
    return [key for key in LEARNING_KEYS if key not in kept], [key for key in LEARNING_ACTORS if key not in kept]


class _Experts:
    """The experts of a config, each once although several slices may have it as a source.

    `base` is the model of the base, or of the files of the output if the config has no base.
    """

    def __init__(self, base: Any, slices: list[GivenSlice], method: Method) -> None:
        self.models: list[Any] = []
        self.places: list[Location] = []
        self.baseless, self.base = base is None, base
        self._indices: dict[tuple[Any, ...], int] = {}
        if base is None:
            first = slices[0].entries[0]
            of_slice = next((one.keys["base_model"] for one in slices if one.keys.get("base_model")), None)
            if of_slice is not None:
                self.base = of_slice
            elif method.base != "required" and isinstance(first, dict):
                self.base = first.get("model")
            else:
                # `Config` reports the missing base.
                self.baseless = False

    def slice(self, given: GivenSlice, entries: list[Any], settings: Any, method: Method, where: Where) -> Slice:
        """Return a slice, whose experts are added to those that are known."""
        own = given.keys.get("base_model")
        base = own or (None if self.baseless else self.base)
        sources: list[Source] = []
        place: int | None = None
        counts: Counter[Any] = Counter()
        for index, (entry, layers) in enumerate(zip(entries, given.layers, strict=True)):
            model = entry.get("model") if isinstance(entry, dict) else None
            parameters = (entry.get("parameters") or {}) if isinstance(entry, dict) else {}
            if base is not None and model == base and place is None:
                place = index
            if place == index and model == self.base:
                # Even with calibration files the base is not an expert: its task vector would be zero.
                sources.append(Source(expert=None, layers=layers, settings=parameters))
            else:
                expert = self._index(entry, counts[str(model)], given.places[index])
                sources.append(Source(expert=expert, layers=layers, settings=parameters))
                counts[str(model)] += 1
        if own is not None and place is None:
            raise ConfigError(
                f"the slice's base_model {shown(repr(own))} is not among its sources",
                where((*given.at, "base_model")),
                "one of the models under `sources`",
                "list it there with its `layer_range`",
            )
        # A base that is only a model like the others takes part where mergekit adds it, or where it is listed.
        takes_part = place is not None or given.from_models or method.base != "ignored"
        return Slice(
            sources=tuple(sources),
            has_base=base is not None and takes_part,
            base=place,
            settings=settings,
            merge_method=given.keys.get("merge_method") and method.name,
            module=given.module,
        )

    def _index(self, entry: Any, count: int, place: Location) -> int:
        """Return the index of an expert in `models`; `count`: how often its slice has had the model before."""
        if not isinstance(entry, dict):
            self.models.append(entry)
            self.places.append(place)
            return len(self.models) - 1
        model, own = entry.get("model"), {key: value for key, value in entry.items() if key != "parameters"}
        key = (str(model), "name" in own, str(own["name"]) if "name" in own else count)
        if key in self._indices:
            index = self._indices[key]
            self.models[index] = own | self.models[index]
            return index
        self._indices[key] = len(self.models)
        if "name" not in own and isinstance(model, str) and model:
            own["name"] = self._free(last_part(model))
        self.models.append(own)
        self.places.append(place)
        return len(self.models) - 1

    def _free(self, name: str) -> str:
        """Return the name, with a number if another expert has it."""
        taken = {one.get("name") for one in self.models if isinstance(one, dict)}
        names = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
        return next(one for one in names if one not in taken)


def _method_of_slice(given: GivenSlice, method: Method, where: Where) -> Method:
    if given.keys.get("merge_method") is None:
        return method
    found = method_of(given.keys, lambda at: where((*given.at, *at)))
    if found is None or found.learned or found.outputs != "one":
        raise ConfigError(
            f"`merge_method` of the slice is {shown(repr(given.keys['merge_method']))}",
            where((*given.at, "merge_method")),
            "the name of a weight-space method whose output is one model",
            "run `python cli.py methods` to list the methods",
        )
    return found


def as_yaml(config: Config) -> dict[str, Any]:
    """Return the config as the keys of a YAML. Reading that YAML gives the same config again."""
    keys = config.model_dump(mode="json", exclude={"record", "search", *INTERNAL}, exclude_none=True)
    recipe = config.recipe
    if config.compress is not None:
        return _compression_yaml(config, keys)
    if recipe is None:
        method = get_method(config.merge_method)
        keys["parameters"] = {key: value for key, value in keys["parameters"].items() if key in method.by_name}
        return keys
    unused, actors = _learning_keys(config.uses_samples)
    for key in (*unused, "parameters"):
        keys.pop(key, None)
    keys["cluster"] = {key: value for key, value in keys["cluster"].items() if key not in actors}
    entries = [{key: value for key, value in entry.items() if key not in unused} for entry in keys.pop("models")]
    if recipe.baseless:
        del keys["base_model"]
    if recipe.tokens != TokenSettings():
        models = [config.base_model, *(expert.model for expert in config.models)]
        keys["tokenizer"] = tokenizer_yaml(keys.pop("tokenizer_source"), recipe.tokens, models)
    return keys | as_slices(config, entries) | {"parameters": recipe.top}


def _compression_yaml(config: Config, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a config of `compress`."""
    assert config.compress is not None
    (model,) = keys["models"]
    own = {"model": keys["base_model"], "compress": config.compress.model_dump(mode="json", exclude_none=True)}
    own |= {"calibration": model["calibration"], "samples": config.parameters.samples_per_model}
    own |= {key: keys["calibration"][key] for key in ("max_length", "shuffle")}
    return own | {key: keys[key] for key in ("seed", "max_shard_size", "cluster", "cache", "cache_size") if key in keys}


def _check(settings: Any, methods: Sequence[Method], at: Location, where: Where) -> None:
    """Check settings against the options of the methods, at least one of which must have each."""
    if not isinstance(settings, dict):
        name = ".".join(map(str, at))
        raise ConfigError(f"{name} is {shown(repr(settings))}", where(at), "a mapping of options to values")
    known = {name: option for method in reversed(methods) for name, option in method.by_name.items()}
    for key, setting in settings.items():
        option = known.get(key)
        if option is None:
            raise ConfigError(
                f"{methods[0].name} has no option {key!r}",
                where((*at, key)),
                do=key_hint(str(key), [*known, *known_options()], key_paths())
                or f"use the options of the method: {', '.join(known) or 'none'}",
            )
        for each in (method.by_name[key] for method in methods if key in method.by_name):
            try:
                each.check(setting)
            except ValueError as error:
                name = ".".join(map(str, (*at, key)))
                raise ConfigError(f"{name}: {error}", where((*at, key)), each.about) from error
