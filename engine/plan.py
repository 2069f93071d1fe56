"""What a merge will do: tensors, shapes, bytes, and where each model is; from config and file headers alone.

Every mismatch between base and experts is found here, before any weight is read and any process started. Knows neither
torch nor Ray.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config import Config, Expert
from engine.errors import CalibrationError, CheckpointError, ConfigError, InputError
from engine.headers import BYTES, FLOATS, ModelHeader, find_model, locate, read_model_header
from engine.lora import AdapterHeader, is_adapter, read_adapter_header
from engine.matching import NO_EXCEPTIONS, Match, match
from engine.methods.registry import NATIVE, check_inputs
from engine.storage import fetch, is_uri
from engine.untrusted import in_time
from engine.vocabulary import has_tokens_for_rows, is_matrix, with_rows_of

SAFETENSORS = {name: code for code, name in FLOATS.items()}


@dataclass(frozen=True)
class ModelPlan:
    """Where a model is, as any node can find it: an absolute path, or a hub id with its commit."""

    model: str
    header: ModelHeader | AdapterHeader


@dataclass(frozen=True)
class ExpertPlan(ModelPlan):
    """One expert θₖ: its prior ᾱₖ (None: still to be found), loss weight βₖ, and the files and number of its
    calibration samples.
    """

    name: str
    weight: float | None
    loss_weight: float
    calibration: tuple[Path, ...]
    samples: int
    match: Match = NO_EXCEPTIONS
    # An adapter of this expert (mergekit's model+lora), where it is not one of the base.
    adapter: ModelPlan | None = None

    @property
    def kind(self) -> str:
        """What its task vector is made of."""
        if self.adapter is not None:
            return "checkpoint and adapter"
        return "adapter" if isinstance(self.header, AdapterHeader) else "checkpoint"


@dataclass(frozen=True)
class Plan:
    """A whole merge. `merged` are the names of the merged tensors ℓ in the order of the base's files."""

    config: Config
    base: ModelPlan
    experts: tuple[ExpertPlan, ...]
    merged: tuple[str, ...]
    dtype: str
    hidden_layers: tuple[int, ...]
    # Whose tokenizer the output has, as any node can find it; None: the base's.
    tokenizer: str | None = None
    # Whose rows embedding and head have beyond the base's own (or: how many of the base's are left).
    rows: ModelPlan | None = None
    # Image files of each expert's samples, once its records have been read.
    images: tuple[tuple[str, ...], ...] = ()

    @property
    def base_header(self) -> ModelHeader:
        """The base's tensors."""
        assert isinstance(self.base.header, ModelHeader)
        return self.base.header

    @property
    def priors(self) -> list[float]:
        """ᾱₖ of every expert, found or given."""
        given = [expert.weight for expert in self.experts]
        found = [weight for weight in given if weight is not None]
        assert len(found) == len(given), "a prior that is still to be found"
        return found

    @cached_property
    def merged_set(self) -> frozenset[str]:
        """`merged`, for membership."""
        return frozenset(self.merged)

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements nₗ of each merged tensor."""
        return {name: self.base_header.tensors[name].numel for name in self.merged}

    @cached_property
    def depths(self) -> dict[str, float]:
        """Where each tensor's layer stands, from 0 to 1 for gradients over layers; 0 for tensors of no layer."""
        places = {name: re.match(r"(.*?)\.(\d+)\.", name) for name in self.base_header.tensors}
        counts: dict[str, int] = {}
        for place in places.values():
            if place:
                counts[place[1]] = max(counts.get(place[1], 0), int(place[2]) + 1)
        return {
            name: 0.0 if not place else int(place[2]) / (count - 1) if (count := counts[place[1]]) > 1 else 1.0
            for name, place in places.items()
        }

    @cached_property
    def orthogonal(self) -> tuple[str, ...]:
        """The merged tensors whose task vectors are made orthogonal: matrices, where the config asks for it."""
        if not self.config.learned or self.config.parameters.task_vectors != "orthogonal":
            return ()
        header = self.base_header
        return tuple(n for n in self.merged if is_matrix(header.tensors[n].shape, has_tokens_for_rows(header, n)))

    @property
    def merged_bytes(self) -> int:
        """M: bytes of the merged tensors in the run's dtype, what an optimiser step moves once each way."""
        return sum(self.numels.values()) * BYTES[SAFETENSORS[self.dtype]]

    def out_dtype(self, name: str) -> str:
        """The dtype, as safetensors writes it, in which a tensor is written.

        Without `out_dtype` and `dtype` a tensor keeps the base's; types that are not floats always do.
        """
        own = self.base_header.tensors[name].dtype
        chosen = self.config.out_dtype or self.config.dtype
        return SAFETENSORS[chosen] if chosen and own in FLOATS else own


def make_plan(config: Config, config_folder: Path) -> Plan:
    """Find every model, read its headers and check that the experts fit the base.

    Raises:
        CheckpointError, CalibrationError, ConfigError: naming the model, the file or the tensor at fault.
    """
    config = _located(config, config_folder)
    base_folder = find_model(config.base_model, config_folder)
    if is_adapter(base_folder):
        raise CheckpointError("the base is an adapter", str(base_folder), "a full checkpoint")
    base = read_model_header(base_folder)
    tokenizer, rows = _tokenizer(config, config_folder), None
    if tokenizer is not None and not config.learned and not is_adapter(tokenizer[1]):
        donor = read_model_header(tokenizer[1])
        rows = ModelPlan(tokenizer[0], donor) if donor.vocab_size != base.vocab_size else None
        base = with_rows_of(base, donor, tokenizer[1])
    tokens = tokenizer[1] if tokenizer else base_folder
    experts = tuple(_plan_expert(config, expert, base, tokens, config_folder) for expert in config.models)
    _check_recipe(config, base, experts)
    merged = _merged(config, base)
    if not merged:
        raise ConfigError("`exclude` leaves no tensor to merge", do=f"its patterns: {', '.join(config.exclude)}")
    return Plan(
        config=config,
        base=ModelPlan(portable(config.base_model, base_folder, config_folder), base),
        experts=experts,
        merged=merged,
        dtype=config.dtype or main_dtype(base),
        hidden_layers=_hidden_layers(config, base) if config.learned else (),
        tokenizer=tokenizer[0] if tokenizer else None,
        rows=rows,
    )


def _located(config: Config, config_folder: Path) -> Config:
    """The config with its folders as absolute paths."""
    found: dict[str, Any] = {}
    if config.log_dir:
        found["log_dir"] = str(locate(config.log_dir, config_folder, ConfigError))
    images = locate(config.calibration.image_folder or ".", config_folder, ConfigError)
    found["calibration"] = config.calibration.model_copy(update={"image_folder": str(images)})
    return config.model_copy(update=found)


def _merged(config: Config, base: ModelHeader) -> tuple[str, ...]:
    """The floats that `exclude` does not name."""
    slow = ConfigError(
        "its regular expressions take too long on the tensors' names", "exclude", do="write simpler ones"
    )
    with in_time(slow):
        return tuple(
            name
            for name, tensor in base.tensors.items()
            if tensor.dtype in FLOATS and tensor.numel and not any(re.match(one, name) for one in config.exclude)
        )


def in_order_of_use(names: Iterable[str]) -> list[str]:
    """Names as a model goes through them: block 2 before block 10, where files often have it the other way round."""
    return sorted(names, key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)])


def slices(plan: Plan, count: int) -> list[tuple[str, ...]]:
    """The merged tensors in `count` slices of about equal bytes, each in the order of the base's files.

    Largest first, each to the slice that has least: the greedy rule of list scheduling. Some may be empty.
    """
    loads, owner = [0] * count, {}
    for name in sorted(plan.merged, key=lambda name: (-plan.numels[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += plan.numels[name]
    return [tuple(name for name in plan.merged if owner[name] == index) for index in range(count)]


def _plan_expert(config: Config, expert: Expert, base: ModelHeader, tokenizer: Path, config_folder: Path) -> ExpertPlan:
    wanted = expert.calibration if config.learned else ()
    calibration = tuple(_calibration_file(expert.name, file.path, config_folder) for file in wanted)
    model, adapter_name = _model_and_adapter(expert.model, config_folder)
    folder = find_model(model, config_folder)
    if adapter_name and folder == base.folder:
        model, adapter_name = adapter_name, None
        folder = find_model(model, config_folder)
        if not is_adapter(folder):
            raise CheckpointError("what follows the + is no adapter", str(folder))
    header: ModelHeader | AdapterHeader
    found, adapter = NO_EXCEPTIONS, None
    if is_adapter(folder):
        if config.recipe is not None and config.recipe.baseless:
            raise CheckpointError("an adapter needs a base", str(folder), do="give `base_model`")
        header = read_adapter_header(folder, base)
    else:
        header = read_model_header(folder)
        found = match(expert.name, header, base, config, tokenizer)
    if adapter_name:
        if config.learned:
            raise ConfigError(
                "an adapter of another model than the base is not supported here",
                expert.model,
                do="merge the two first",
            )
        where = find_model(adapter_name, config_folder)
        adapter = ModelPlan(portable(adapter_name, where, config_folder), read_adapter_header(where, base))
    return ExpertPlan(
        model=portable(model, folder, config_folder),
        header=header,
        name=expert.name,
        weight=config.weight(expert),
        loss_weight=config.loss_weight(expert),
        calibration=calibration,
        samples=config.samples_per_model(expert),
        match=found,
        adapter=adapter,
    )


def _model_and_adapter(model: str, config_folder: Path) -> tuple[str, str | None]:
    """The two parts of mergekit's model+lora, unless the + belongs to a folder's name."""
    if is_uri(model):
        # What follows a + is a part of the name, unless it is a URI too.
        parts = re.split(r"\+(?=[a-z0-9]+://)", model, maxsplit=1)
        return parts[0], parts[1] if len(parts) > 1 else None
    if "+" not in model or os.path.isdir(locate(model, config_folder, CheckpointError)):  # noqa: PTH112
        return model, None
    first, _, second = model.partition("+")
    return first, second


def _tokenizer(config: Config, config_folder: Path) -> tuple[str, Path] | None:
    """Whose tokenizer the output has, and its folder; None: the base's."""
    source = config.tokenizer_source
    if source in (None, "base", config.base_model):
        return None
    named = {model.name: model.model for model in config.models}
    model = named.get(str(source), str(source))
    folder = find_model(model, config_folder)
    return portable(model, folder, config_folder), folder


def _check_recipe(config: Config, base: ModelHeader, experts: Sequence[ExpertPlan]) -> None:
    """What the settings of a method that learns nothing ask of the models."""
    recipe = config.recipe
    if recipe is None:
        if config.on_missing != "error":
            raise ConfigError(
                f"`on_missing: {config.on_missing}` is of methods that learn nothing", config.merge_method
            )
        return
    if recipe.layers is not None and recipe.layers != base.num_layers:
        raise ConfigError(
            f"layer-stacking slices are not supported: this has {recipe.layers} layers, the model {base.num_layers}",
            "slices",
            f"layer_range: [0, {base.num_layers}]",
        )
    names = [expert.name for expert in experts]
    check_inputs(config.merge_method, names, not recipe.baseless)
    unfit = [name for name in names if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..", "merge")]
    if unfit and NATIVE.get(config.merge_method) and NATIVE[config.merge_method].outputs == "experts":
        raise ConfigError(f"the expert's name {unfit[0]!r} cannot be a folder's", "models", do="give it another `name`")


def _calibration_file(expert: str, path: str, config_folder: Path) -> Path:
    try:
        found = fetch(path, ()) if is_uri(path) else locate(path, config_folder)
        if os.path.isfile(found):  # noqa: PTH113 - false, not an error, for a name that no file can have
            return found
        where = str(found)
    except InputError as error:
        where = str(error)
    raise CalibrationError(f"expert {expert!r} has no such calibration file", where)


def _hidden_layers(config: Config, base: ModelHeader) -> tuple[int, ...]:
    """S as indices into `hidden_states`: 0 is the embedding output, i the output of block i."""
    last = base.num_layers
    if last is None:
        raise CheckpointError("config.json does not say how many blocks the model has", str(base.folder))
    chosen = config.parameters.hidden_layers
    if chosen == "middle":
        return (last // 2,)
    if chosen == "all":
        return tuple(range(last + 1))
    outside = [index for index in chosen if not 0 <= index <= last]
    if outside:
        raise ConfigError(f"hidden_layers names {outside[0]}", str(base.folder), f"indices 0 to {last}: {last} blocks")
    return tuple(sorted(set(chosen)))


def main_dtype(base: ModelHeader) -> str:
    """The float type that most of the base's bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in base.tensors.values():
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.nbytes
    if not sizes:
        raise CheckpointError("no tensor is float32, bfloat16 or float16", str(base.folder))
    return sizes.most_common(1)[0][0]


def portable(model: str, folder: Path, config_folder: Path) -> str:
    """How another node finds the same files: a path or a URI as it is, a hub id with the commit that names its cache
    folder.
    """
    if is_uri(model):
        return model
    if folder == locate(model, config_folder):
        return str(folder)
    return f"{model.partition('@')[0]}@{folder.name}"
