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

from engine.checkpoints.find import check_folder
from engine.checkpoints.headers import CONVERT, FLOATS, ModelHeader, TensorHeader, read_file_header, read_json
from engine.errors import CheckpointError
from engine.untrusted import cpu_limit, shown

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


# Architectures whose linear layers are Conv1D, which stores [in, out], and the names of those layers.
CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}


# No rank and no alpha are as large.
LIMIT = 1e9


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
    check_folder(folder)
    config = read_json(folder / CONFIG)
    _refuse_variants(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"no {WEIGHTS} here; pickled adapters are not read", str(folder), do=CONVERT.replace("transformers", "peft")
        )
    tensors = read_file_header(folder / WEIGHTS)
    names = _file_names(base)
    factors: dict[str, dict[str, str]] = {}
    for name in tensors:
        if name.endswith(".base_layer.weight") and _is_frozen_copy(name, tensors, base, names):
            continue
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise CheckpointError(f"the tensor {name!r} is not part of a LoRA pair", str(folder / WEIGHTS))
        factors.setdefault(name[len(PREFIX) : -len(suffix)], {})[SUFFIXES[suffix]] = name
    if not factors:
        raise CheckpointError("the adapter has no tensors", str(folder / WEIGHTS))
    slow = "its rank_pattern or alpha_pattern takes too long on the modules' names"
    with cpu_limit(CheckpointError(slow, str(folder / CONFIG))):
        pairs = dict(_pair(module, names, two, config, tensors, base, folder) for module, two in factors.items())
    return AdapterHeader(folder, pairs, tensors)


def _file_names(base: ModelHeader) -> dict[str, str]:
    """The base's tensors by their own names, and by what is left of these without the prefixes of language models.

    An adapter names modules, and a model that also sees has other names for them than its files: in files
    `language_model.model.layers…` or `model.layers…`, in the module `model.language_model.layers…`.
    """
    names: dict[str, str] = {}
    twice: set[str] = set()
    for name in base.tensors:
        short = _short(name)
        twice |= {short} & names.keys()
        names[short] = name
    return {short: name for short, name in names.items() if short not in twice} | {name: name for name in base.tensors}


def _short(name: str) -> str:
    return re.sub(r"^((model|language_model)\.)+", "", name)


def _pair(
    module: str,
    known: dict[str, str],
    names: dict[str, str],
    config: dict[str, Any],
    tensors: dict[str, TensorHeader],
    base: ModelHeader,
    folder: Path,
) -> tuple[str, LoraPair]:
    """The base tensor that the factors `names` of a module change, and how."""
    wanted = f"{module}.weight"
    target = known.get(wanted, known.get(_short(wanted), wanted))
    if set(names) != {"a", "b"}:
        raise CheckpointError(f"the module {module!r} has one LoRA factor without the other", str(folder / WEIGHTS))
    if target not in base.tensors:
        raise CheckpointError(f"it changes {target!r}, which the base does not have", str(folder), do="check the base")
    a, b = tensors[names["a"]], tensors[names["b"]]
    for factor in (a, b):
        if factor.dtype not in FLOATS:
            raise CheckpointError(f"{factor.name!r} is {factor.dtype}", str(folder), f"one of {', '.join(FLOATS)}")
    scaling = _scaling(config, module, a, folder)
    return target, LoraPair(a.name, b.name, scaling, _is_transposed(a, b, base, target, folder))


def _refuse_variants(config: dict[str, Any], where: Path) -> None:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"the adapter uses {what}, which is not supported",
            str(where),
            "a LoRA adapter (rank and alpha patterns and rslora are fine)",
            "merge the adapter into its base (peft's merge_and_unload) and give the result as a full checkpoint",
        )

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type {shown(repr(config.get('peft_type')))}")
    if config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise refuse(f"init_lora_weights {shown(repr(config['init_lora_weights']))} (it changes the base's weights)")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias {shown(repr(config['bias']))}")
    if config.get("use_dora"):
        raise refuse("DoRA (use_dora)")
    for key, value in config.items():
        if value and key not in HARMLESS | {"init_lora_weights", "bias"}:
            raise refuse(shown(key))


def _scaling(config: dict[str, Any], module: str, a: TensorHeader, folder: Path) -> float:
    """α/r, or α/√r with rslora; the patterns' keys match the end of a module's name."""

    def matched(patterns: Any, default: Any) -> Any:
        found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, default)

    where = str(folder / CONFIG)
    try:
        rank = matched(config.get("rank_pattern"), config.get("r"))
        alpha = matched(config.get("alpha_pattern"), config.get("lora_alpha"))
    except (AttributeError, OverflowError, RecursionError, re.error) as error:
        raise CheckpointError(f"rank_pattern or alpha_pattern is wrong: {shown(str(error))}", where) from error
    if type(rank) is not int or not 0 < rank < LIMIT or type(alpha) not in (int, float) or not abs(alpha) < LIMIT:
        raise CheckpointError(
            f"rank {shown(repr(rank))} and alpha {shown(repr(alpha))} of {module!r}",
            where,
            "`r` of 1 or more, and a finite `lora_alpha`",
        )
    if not a.shape or a.shape[0] != rank:
        raise CheckpointError(f"{a.name!r} has shape {a.shape}", str(folder), f"rank {rank}, as {CONFIG} says")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_frozen_copy(name: str, tensors: dict[str, TensorHeader], base: ModelHeader, known: dict[str, str]) -> bool:
    """Whether it is the base's own embedding or head, which peft saves beside an adapter of it, frozen as it was."""
    wanted = name.removeprefix(PREFIX).removesuffix(".base_layer.weight") + ".weight"
    target = base.tensors.get(known.get(wanted, known.get(_short(wanted), wanted)))
    return target is not None and target.shape == tensors[name].shape


def _is_transposed(a: TensorHeader, b: TensorHeader, base: ModelHeader, target: str, folder: Path) -> bool:
    """Whether the base stores the weight as [in, out], so that ΔW = scaling · (B·A)ᵀ.

    Shapes say it where they differ. Where the weight is square, embeddings are transposed and so are Conv1D modules;
    `fan_in_fan_out` would say it too, but peft saves one flag for all modules, that of the last.
    """
    wanted = base.tensors[target].shape
    product = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] else None
    if product is None or wanted not in (product, product[::-1]):
        raise CheckpointError(
            f"the factors of {target!r} have shapes {a.shape} and {b.shape}",
            str(folder),
            f"a product of the base's shape {wanted}",
        )
    if product != product[::-1]:
        return wanted != product
    module = target.split(".")[-2]
    return "lora_embedding" in a.name or (base.config.get("model_type") in CONV1D and module in CONV1D_MODULES)
