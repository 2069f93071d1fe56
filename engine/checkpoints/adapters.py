"""PEFT LoRA adapters: the factors and the scaling, or the whole weight, of each base tensor that an adapter changes.

Read from adapter_config.json and the header of adapter_model.safetensors, without torch. Whole tensors in that file are
compared with the base's. The products are computed block by block in `engine/task_vectors/kinds.py`.

Sources: Hu et al., LoRA, arXiv 2106.09685 (ΔW = α/r · B·A); Kalajdzievski, rsLoRA, arXiv 2312.03732 (α/√r).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoints.adapter_copies import drop_tied_head, trained_whole
from engine.checkpoints.adapter_file import CONFIG, DELTA, WEIGHTS, AdapterFile, merge_with_peft, read_deltas
from engine.checkpoints.find import check_folder
from engine.checkpoints.headers import CONVERT, FLOATS, ModelHeader, TensorHeader, read_file_header, read_json
from engine.errors import CheckpointError
from engine.untrusted import cpu_limit, shown

# Keys of the config that do not alter the form ΔW = scaling · B·A. Any other key that is not handled below belongs to
# an unknown variant of LoRA, and is refused if it is switched on.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip

# Adapters and variants that cannot be merged into the base's weights either: they add inputs or layers, or depend on
# the input.
NEVER_MERGED = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING",
    "P_TUNING", "XLORA", "alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias", "megatron_config",
}  # fmt: skip


# Model types whose linear layers are Conv1D, which stores [in, out], and the names of these layers.
# A tuple, since a config may give any value as its type.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}

# Characters of the base's name in a message: a path that is to be given as `base_model` must be whole.
NAME = 1000

# Upper bound for a plausible rank or alpha.
LIMIT = 1e9

# Initialisations that keep the base's weights; the others (PiSSA, OLoRA, CorDA, LoftQ, …) replace them.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraPair:
    """The factors of one base tensor, ΔW = scaling · B·A.

    `a` (shape [r, in]) and `b` (shape [out, r]) are tensor names in the adapter's file. `transposed`: the base stores
    the weight as [in, out] (GPT-2's Conv1D, embeddings), so that ΔW = scaling · (B·A)ᵀ.
    """

    a: str
    b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter folder, or one of compressed task vectors.

    Attributes:
        folder: The folder.
        pairs: The factors of base tensors, by the base's name.
        tensors: The tensors of the adapter's file.
        whole: Base tensors that the adapter replaces by a whole tensor, and that tensor's name in its file. The product
            of a pair of the same base tensor is added to it.
        is_delta: It is of compressed task vectors (docs/compress.md), which a whole checkpoint was made into.
    """

    folder: Path
    pairs: dict[str, LoraPair]
    tensors: dict[str, TensorHeader]
    whole: dict[str, str] = field(default_factory=dict)
    is_delta: bool = False


def is_adapter(folder: Path) -> bool:
    """Return whether the folder is a PEFT adapter, or one of compressed task vectors, rather than a full checkpoint."""
    return (folder / CONFIG).exists() or (folder / DELTA).exists()


def read_adapter_header(
    folder: Path, base: ModelHeader, in_model: Callable[[str], str | None] = lambda name: None
) -> AdapterHeader:
    """Read the adapter's pairs and whole tensors, and check each against the base tensor that it changes.

    Args:
        folder: The adapter's folder.
        base: The header of the base.
        in_model: Returns the base's tensor for a parameter's name in the model, where it is not that of a file.

    Raises:
        CheckpointError: the adapter is not LoRA, is an unsupported variant, has a tensor that does not fit the base, or
            changes embedding and head differently, which the base ties.
    """
    check_folder(folder)
    if (folder / DELTA).exists():
        tensors, packed, own = read_deltas(folder, base)
        pairs = {name: LoraPair(right, left, 1.0, False) for name, (left, right) in packed.items()}
        return AdapterHeader(folder, pairs, tensors, own, is_delta=True)
    config = read_json(folder / CONFIG)
    weights = folder / WEIGHTS
    file = AdapterFile(folder, config, read_file_header(weights) if weights.exists() else {}, base, in_model)
    _refuse_variants(file)
    if not weights.exists():
        raise CheckpointError(
            f"the adapter has no {WEIGHTS}; pickled adapters are not supported",
            str(folder),
            do=CONVERT.replace("transformers", "peft"),
        )
    _check_saved(file)
    drop_tied_head(file)
    whole = trained_whole(file)
    # Outside the limit, since the base may have to be built to find the names in it.
    targets = {module: file.target(f"{module}.weight") for module in file.parts.factors}
    slow = "matching rank_pattern or alpha_pattern to the names of the modules takes too long"
    with cpu_limit(CheckpointError(slow, str(folder / CONFIG))):
        pairs = {target: _pair(file, module, target) for module, target in targets.items()}
    return AdapterHeader(folder, pairs, file.tensors, whole)


def check_merged(adapter: AdapterHeader, merged: Collection[str], exclude: Sequence[str]) -> None:
    """Check that the merge leaves out no tensor that the adapter saves whole, and not all of its pairs.

    Compressed task vectors were a checkpoint, of which a merge may leave tensors out.

    Args:
        adapter: The adapter.
        merged: The tensors that are merged, by the base's names.
        exclude: The patterns of tensors that are not.

    Raises:
        CheckpointError: it does.
    """
    lost = [name for name in adapter.whole if name not in merged]
    if not any(name in merged for name in (*adapter.pairs, *adapter.whole)):
        lost += adapter.pairs
    if not lost or adapter.is_delta:
        return
    others = [pattern for pattern in exclude if not any(re.match(pattern, name) for name in lost)]
    if len(others) == len(exclude):
        # Left out by its role, such as a norm, of which the default patterns know the names of some families only.
        others = []
    raise CheckpointError(
        f"the adapter changes {lost[0]!r}, but `exclude` keeps the base's values",
        str(adapter.folder),
        do=f"set `exclude: {json.dumps(others)}` to merge it",
    )


def _pair(file: AdapterFile, module: str, target: str) -> LoraPair:
    """Return the pair of a module's factors, which change the base tensor `target`."""
    folder, factors = file.folder, file.parts.factors[module]
    trained_on = str(file.config.get("base_model_name_or_path") or "")
    if set(factors) != {"A", "B"}:
        raise CheckpointError(f"the module {module!r} has only one of its two LoRA factors", str(folder / WEIGHTS))
    if target not in file.base.tensors:
        raise CheckpointError(
            f"the adapter changes {target!r}, which the base does not have",
            str(folder),
            do=f"use the base that the adapter was trained on{f': {shown(trained_on, NAME)}' if trained_on else ''}",
        )
    a, b = file.tensors[factors["A"]], file.tensors[factors["B"]]
    for factor in (a, b):
        if factor.dtype not in FLOATS:
            what = f"the factor {factor.name!r} has dtype {factor.dtype}"
            raise CheckpointError(what, str(folder), f"one of {', '.join(FLOATS)}")
    scaling = _scaling(file.config, module, a, folder)
    return LoraPair(a.name, b.name, scaling, _is_transposed(a, b, file.base, target, folder))


def _refuse_variants(file: AdapterFile) -> None:
    def refuse(key: str, quoted: bool = True) -> CheckpointError:
        value = file.config.get(key)
        merged = f"merge it with peft, and use the result as the expert: {merge_with_peft(file)}"
        return CheckpointError(
            f"the adapter uses {shown(f'{key} {value!r}' if quoted else key)}, which is not supported",
            str(file.folder / CONFIG),
            "a LoRA adapter, where rank_pattern, alpha_pattern, use_rslora and modules_to_save are allowed",
            "" if key in NEVER_MERGED or str(value) in NEVER_MERGED else merged,
        )

    if file.config.get("peft_type") != "LORA":
        raise refuse("peft_type")
    if file.config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise refuse("init_lora_weights")
    for key, value in file.config.items():
        if value and key not in HARMLESS | {"init_lora_weights"}:
            raise refuse(key, quoted=False)


def _check_saved(file: AdapterFile) -> None:
    """Check that the file holds the modules that the config says are saved whole."""
    saved = file.config.get("modules_to_save") or []
    for module in saved if isinstance(saved, list) else [saved]:
        if not any(f".{module}." in f".{name}" for name in file.parts.whole):
            raise CheckpointError(
                f"modules_to_save has {shown(repr(module))}, but the file has no tensor of it",
                str(file.folder / WEIGHTS),
                do=f"save the adapter again with peft, or remove the module from {CONFIG} if it was not trained",
            )


def _scaling(config: dict[str, Any], module: str, a: TensorHeader, folder: Path) -> float:
    """Return α/r, or α/√r with use_rslora. The patterns' keys match the end of a module's name, as in peft."""

    def matched(patterns: Any, default: Any) -> Any:
        values = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(values, default)

    where = str(folder / CONFIG)
    try:
        rank = matched(config.get("rank_pattern"), config.get("r"))
        alpha = matched(config.get("alpha_pattern"), config.get("lora_alpha"))
    except (AttributeError, OverflowError, RecursionError, re.error) as error:
        raise CheckpointError(f"rank_pattern or alpha_pattern is invalid: {shown(str(error))}", where) from error
    if type(rank) is not int or not 0 < rank < LIMIT or type(alpha) not in (int, float) or not abs(alpha) < LIMIT:
        raise CheckpointError(
            f"the module {module!r} has rank {shown(repr(rank))} and alpha {shown(repr(alpha))}",
            where,
            "an integer `r` of 1 or more, and a finite `lora_alpha`",
        )
    if not a.shape or a.shape[0] != rank:
        raise CheckpointError(
            f"the factor {a.name!r} has shape {a.shape}",
            str(folder),
            f"{rank} rows, for rank {rank} in {CONFIG}",
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_transposed(a: TensorHeader, b: TensorHeader, base: ModelHeader, target: str, folder: Path) -> bool:
    """Return whether the base stores the weight as [in, out], so that ΔW = scaling · (B·A)ᵀ.

    The shapes decide, unless the weight is square. A square weight is transposed in embeddings and Conv1D modules.
    `fan_in_fan_out` of the adapter's config is not used: peft saves a single flag, that of the last module.
    """
    wanted = base.tensors[target].shape
    product = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] else None
    if product is None or wanted not in (product, product[::-1]):
        raise CheckpointError(
            f"the factors of {target!r} have shapes {a.shape} and {b.shape}",
            str(folder),
            f"factors whose product has the base's shape {wanted}",
        )
    if product != product[::-1]:
        return wanted != product
    module = target.split(".")[-2]
    return "lora_embedding" in a.name or (base.config.get("model_type") in CONV1D and module in CONV1D_MODULES)
