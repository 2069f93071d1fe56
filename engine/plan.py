"""What a merge will do: tensors, shapes, bytes, and where each model is; from config and file headers alone.

Every mismatch between base and experts is found here, before any weight is read and any process started. Knows neither
torch nor Ray.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.config import Config, Expert
from engine.errors import CalibrationError, CheckpointError, ConfigError, InputError
from engine.headers import BYTES, FLOATS, ModelHeader, find_model, locate, read_model_header
from engine.lora import AdapterHeader, is_adapter, read_adapter_header

SAFETENSORS = {name: code for code, name in FLOATS.items()}


@dataclass(frozen=True)
class ModelPlan:
    """Where a model is, as any node can find it: an absolute path, or a hub id with its commit."""

    model: str
    header: ModelHeader | AdapterHeader


@dataclass(frozen=True)
class ExpertPlan(ModelPlan):
    """One expert θₖ: its prior ᾱₖ, loss weight βₖ, and the files and number of its calibration samples."""

    name: str
    weight: float
    loss_weight: float
    calibration: tuple[Path, ...]
    samples: int

    @property
    def kind(self) -> str:
        """What its task vector is made of."""
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

    @property
    def base_header(self) -> ModelHeader:
        """The base's tensors."""
        assert isinstance(self.base.header, ModelHeader)
        return self.base.header

    @cached_property
    def merged_set(self) -> frozenset[str]:
        """`merged`, for membership."""
        return frozenset(self.merged)

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements nₗ of each merged tensor."""
        return {name: self.base_header.tensors[name].numel for name in self.merged}

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
    base_folder = find_model(config.base_model, config_folder)
    if is_adapter(base_folder):
        raise CheckpointError("the base is an adapter", str(base_folder), "a full checkpoint")
    base = read_model_header(base_folder)
    experts = tuple(_plan_expert(config, expert, base, config_folder) for expert in config.models)
    merged = tuple(
        name
        for name, tensor in base.tensors.items()
        if tensor.dtype in FLOATS and tensor.numel and not any(re.match(pattern, name) for pattern in config.exclude)
    )
    if not merged:
        raise ConfigError("`exclude` leaves no tensor to merge", do=f"its patterns: {', '.join(config.exclude)}")
    return Plan(
        config=config,
        base=ModelPlan(_portable(config.base_model, base_folder, config_folder), base),
        experts=experts,
        merged=merged,
        dtype=config.dtype or _main_dtype(base),
        hidden_layers=_hidden_layers(config, base),
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


def _plan_expert(config: Config, expert: Expert, base: ModelHeader, config_folder: Path) -> ExpertPlan:
    calibration = tuple(_calibration_file(expert.name, path, config_folder) for path in expert.calibration)
    folder = find_model(expert.model, config_folder)
    header: ModelHeader | AdapterHeader
    if is_adapter(folder):
        header = read_adapter_header(folder, base)
    else:
        header = read_model_header(folder)
        _check_same_tensors(expert.name, header, base)
    return ExpertPlan(
        model=_portable(expert.model, folder, config_folder),
        header=header,
        name=expert.name,
        weight=config.weight(expert),
        loss_weight=config.loss_weight(expert),
        calibration=calibration,
        samples=config.samples_per_model(expert),
    )


def _calibration_file(expert: str, path: str, config_folder: Path) -> Path:
    try:
        found = locate(path, config_folder)
        if os.path.isfile(found):  # noqa: PTH113 - false, not an error, for a name that no file can have
            return found
        where = str(found)
    except InputError as error:
        where = str(error)
    raise CalibrationError(f"expert {expert!r} has no such calibration file", where)


def _check_same_tensors(name: str, expert: ModelHeader, base: ModelHeader) -> None:
    """An expert is the base fine-tuned: same architecture, same vocabulary, same tensors."""
    where = f"expert {name!r} ({expert.folder})"
    if expert.architecture != base.architecture:
        raise CheckpointError(f"its architecture is {expert.architecture}", where, f"the base's: {base.architecture}")
    if expert.vocab_size != base.vocab_size:
        raise CheckpointError(
            f"its vocabulary has {expert.vocab_size} tokens",
            where,
            f"the base's {base.vocab_size}: task vectors need one",
        )
    lacking = [tensor for tensor in base.tensors if tensor not in expert.tensors]
    added = [tensor for tensor in expert.tensors if tensor not in base.tensors]
    if lacking or added:
        parts = [f"lacks {len(lacking)} of the base's tensors (first: {lacking[0]!r})"] if lacking else []
        parts += [f"has {len(added)} that the base does not have (first: {added[0]!r})"] if added else []
        raise CheckpointError(f"it {' and '.join(parts)}", where, f"the base's {len(base.tensors)} tensors")
    for tensor in base.tensors.values():
        other = expert.tensors[tensor.name]
        if other.shape != tensor.shape:
            raise CheckpointError(f"{tensor.name!r} has shape {other.shape}", where, f"the base's {tensor.shape}")
        if (other.dtype in FLOATS) != (tensor.dtype in FLOATS):
            raise CheckpointError(f"{tensor.name!r} is {other.dtype}", where, f"a float, as the base's {tensor.dtype}")


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


def _main_dtype(base: ModelHeader) -> str:
    """The float type that most of the base's bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in base.tensors.values():
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.nbytes
    if not sizes:
        raise CheckpointError("no tensor is float32, bfloat16 or float16", str(base.folder))
    return sizes.most_common(1)[0][0]


def _portable(model: str, folder: Path, config_folder: Path) -> str:
    """How another node finds the same files: a path as it is, a hub id with the commit that names its cache folder."""
    if folder == locate(model, config_folder):
        return str(folder)
    return f"{model.partition('@')[0]}@{folder.name}"
