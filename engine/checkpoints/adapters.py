"""PEFT LoRA adapters: the pair of factors and the scaling of each base tensor that an adapter changes.

Read from adapter_config.json and the header of adapter_model.safetensors alone, without torch. The products are
computed block by block in `engine/task_vectors/kinds.py`.

Sources: Hu et al., LoRA, arXiv 2106.09685 (ΔW = α/r · B·A); Kalajdzievski, rsLoRA, arXiv 2312.03732 (α/√r).
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

# Names of tensors in the adapter's file: PREFIX, module, one of SUFFIXES.
PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b"}

# Keys of the config that do not alter the form ΔW = scaling · B·A. Any other key that is not handled below belongs to
# an unknown variant of LoRA, and is refused if it is switched on.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


# Model types whose linear layers are Conv1D, which stores [in, out], and the names of these layers.
# A tuple, since a config may give any value as its type.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}

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
    """An adapter folder: `pairs` by base tensor name (other base tensors are unchanged), and the file's tensors."""

    folder: Path
    pairs: dict[str, LoraPair]
    tensors: dict[str, TensorHeader]


def is_adapter(folder: Path) -> bool:
    """Return whether the folder is a PEFT adapter rather than a full checkpoint."""
    return (folder / CONFIG).exists()


def read_adapter_header(folder: Path, base: ModelHeader) -> AdapterHeader:
    """Read the adapter's pairs, and check each against the base tensor that it changes.

    Raises:
        CheckpointError: the adapter is not LoRA, is an unsupported variant, or has a pair that does not fit the base.
    """
    check_folder(folder)
    config = read_json(folder / CONFIG)
    _refuse_variants(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"the adapter has no {WEIGHTS}; pickled adapters are not supported",
            str(folder),
            do=CONVERT.replace("transformers", "peft"),
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
    slow = "matching rank_pattern or alpha_pattern to the names of the modules takes too long"
    with cpu_limit(CheckpointError(slow, str(folder / CONFIG))):
        pairs = dict(_pair(module, names, pair, config, tensors, base, folder) for module, pair in factors.items())
    return AdapterHeader(folder, pairs, tensors)


def _file_names(base: ModelHeader) -> dict[str, str]:
    """Return the base's tensor names by full name, and by the name without language model prefixes where it is unique.

    An adapter uses names of modules, and in multimodal models these differ from the names in the files:
    `model.language_model.layers…` in the module, `language_model.model.layers…` or `model.layers…` in files.
    """
    names: dict[str, str] = {}
    ambiguous: set[str] = set()
    for name in base.tensors:
        short = _short(name)
        ambiguous |= {short} & names.keys()
        names[short] = name
    unique = {short: name for short, name in names.items() if short not in ambiguous}
    return unique | {name: name for name in base.tensors}


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
    """Return the base tensor that a module's factors change, and their pair.

    `known` is from `_file_names`; `names` maps "a" and "b" to tensor names in the adapter's file.
    """
    wanted = f"{module}.weight"
    target = known.get(wanted, known.get(_short(wanted), wanted))
    if set(names) != {"a", "b"}:
        raise CheckpointError(f"the module {module!r} has only one of its two LoRA factors", str(folder / WEIGHTS))
    if target not in base.tensors:
        raise CheckpointError(
            f"the adapter changes {target!r}, which the base does not have",
            str(folder),
            do="use the base that the adapter was trained on",
        )
    a, b = tensors[names["a"]], tensors[names["b"]]
    for factor in (a, b):
        if factor.dtype not in FLOATS:
            what = f"the factor {factor.name!r} has dtype {factor.dtype}"
            raise CheckpointError(what, str(folder), f"one of {', '.join(FLOATS)}")
    scaling = _scaling(config, module, a, folder)
    return target, LoraPair(a.name, b.name, scaling, _is_transposed(a, b, base, target, folder))


def _refuse_variants(config: dict[str, Any], where: Path) -> None:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"the adapter uses {what}, which is not supported",
            str(where),
            "a LoRA adapter, where rank_pattern, alpha_pattern and use_rslora are allowed",
            "merge the adapter into its base with peft's merge_and_unload, and use the result as a full checkpoint",
        )

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type {shown(repr(config.get('peft_type')))}")
    if config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise refuse(f"init_lora_weights {shown(repr(config['init_lora_weights']))} (which changes the base's weights)")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias {shown(repr(config['bias']))}")
    if config.get("use_dora"):
        raise refuse("DoRA (use_dora)")
    for key, value in config.items():
        if value and key not in HARMLESS | {"init_lora_weights", "bias"}:
            raise refuse(shown(key))


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


def _is_frozen_copy(name: str, tensors: dict[str, TensorHeader], base: ModelHeader, known: dict[str, str]) -> bool:
    """Return whether a tensor is the base's frozen embedding or head, which peft saves next to an adapter of it."""
    wanted = name.removeprefix(PREFIX).removesuffix(".base_layer.weight") + ".weight"
    target = base.tensors.get(known.get(wanted, known.get(_short(wanted), wanted)))
    return target is not None and target.shape == tensors[name].shape


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
