"""What a PEFT LoRA adapter changes: which base tensor gets which pair of factors, at which scale.

From adapter_config.json and the header of adapter_model.safetensors alone; no torch. The product of the factors is
computed block by block in `engine/checkpoint.py`. Source: Hu et al., LoRA, arXiv 2106.09685 (ΔW = α/r · B·A);
Kalajdzievski, rsLoRA, arXiv 2312.03732 (α/√r).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.headers import ModelHeader, TensorHeader, read_file_header, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b"}

# Keys that change nothing about ΔW = scaling · B·A, whatever their value. A key that is neither here nor handled below
# belongs to a variant of LoRA that we do not know, so a value that switches it on is refused.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base's weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, …) replace them.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraPair:
    """ΔW = scaling · B·A of one base tensor; `a` [r, in] and `b` [out, r] are names in the adapter's file.

    `transposed`: the base stores the weight as [in, out] (GPT-2's Conv1D, embeddings), so ΔW = scaling · (B·A)ᵀ.
    """

    a: str
    b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter folder: base tensor name → its pair; a base tensor that is absent is not changed."""

    folder: Path
    pairs: dict[str, LoraPair]
    tensors: dict[str, TensorHeader]


def is_adapter(folder: Path) -> bool:
    """Whether the folder is a PEFT adapter rather than a full checkpoint."""
    return (folder / CONFIG).exists()


def read_adapter_header(folder: Path, base: ModelHeader) -> AdapterHeader:
    """The adapter's pairs, each checked against the base tensor that it changes.

    Raises:
        CheckpointError: not LoRA, a variant that is not supported (named), or a pair that does not fit the base.
    """
    config = read_json(folder / CONFIG)
    _refuse_variants(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"no {WEIGHTS} here; pickled adapters are not read", str(folder))
    tensors = read_file_header(folder / WEIGHTS)
    factors: dict[str, dict[str, str]] = {}
    for name in tensors:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise CheckpointError(f"the tensor {name!r} is not part of a LoRA pair", str(folder / WEIGHTS))
        factors.setdefault(name[len(PREFIX) : -len(suffix)], {})[SUFFIXES[suffix]] = name
    if not factors:
        raise CheckpointError("the adapter has no tensors", str(folder / WEIGHTS))
    pairs = {}
    for module, names in factors.items():
        target = f"{module}.weight"
        if set(names) != {"a", "b"}:
            raise CheckpointError(f"the module {module!r} has one LoRA factor without the other", str(folder / WEIGHTS))
        if target not in base.tensors:
            raise CheckpointError(
                f"it changes {target!r}, which the base does not have", str(folder), do="check the base"
            )
        transposed = bool(config.get("fan_in_fan_out")) or "lora_embedding" in names["a"]
        pair = LoraPair(names["a"], names["b"], _scaling(config, module, tensors[names["a"]], folder), transposed)
        _check_shapes(pair, tensors, base.tensors[target], folder)
        pairs[target] = pair
    return AdapterHeader(folder, pairs, tensors)


def _refuse_variants(config: dict[str, Any], where: Path) -> None:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"the adapter uses {what}, which is not supported",
            str(where),
            "a LoRA adapter (rank and alpha patterns and rslora are fine)",
            "merge the adapter into its base (peft's merge_and_unload) and give the result as a full checkpoint",
        )

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type {config.get('peft_type')!r}")
    if config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise refuse(f"init_lora_weights {config['init_lora_weights']!r} (it changes the base's weights)")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias {config['bias']!r}")
    if config.get("use_dora"):
        raise refuse("DoRA (use_dora)")
    for key, value in config.items():
        if value and key not in HARMLESS | {"init_lora_weights", "bias"}:
            raise refuse(f"{key}")


def _scaling(config: dict[str, Any], module: str, a: TensorHeader, folder: Path) -> float:
    """α/r, or α/√r with rslora; the patterns' keys match the end of a module's name."""

    def matched(patterns: Any, default: Any) -> Any:
        found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, default)

    try:
        rank = int(matched(config.get("rank_pattern"), config["r"]))
        alpha = float(matched(config.get("alpha_pattern"), config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"r, lora_alpha or a pattern is missing or wrong: {error}", str(folder / CONFIG)
        ) from error
    if not a.shape or a.shape[0] != rank:
        raise CheckpointError(f"{a.name!r} has shape {a.shape}", str(folder), f"rank {rank}, as {CONFIG} says")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_shapes(pair: LoraPair, tensors: dict[str, TensorHeader], base: TensorHeader, folder: Path) -> None:
    a, b = tensors[pair.a].shape, tensors[pair.b].shape
    product = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else None
    if product is None or (product[::-1] if pair.transposed else product) != base.shape:
        raise CheckpointError(
            f"the factors of {base.name!r} have shapes {a} and {b}",
            str(folder),
            f"a product of the base's shape {base.shape}",
        )
