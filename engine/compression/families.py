"""The families of mixtures of experts that can be made smaller, and the checks of a number of experts by config.json.

In transformers, their layers are the same modules: a router `gate`, whose weight has a row an expert, and `experts`
with the fused parameters `gate_up_proj` and `down_proj`. `engine.compression.layout` finds the tensors of the files
that these are, fused or an expert each. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

from typing import Any

from engine.checkpoints.headers import ModelHeader
from engine.errors import CheckpointError, ConfigError
from engine.methods.compression import Compression

# By `model_type`: how the router scores experts, from which the experts of a token are chosen.
SCORES = {"qwen3_moe": "softmax", "mixtral": "softmax", "olmoe": "softmax", "deepseek_v3": "sigmoid"}
NAMES = "Qwen3-MoE, Mixtral, OLMoE, DeepSeek-V3"
# Keys of the number of experts. A config may have one or more of them, which then agree.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# The folder of compressed layers in the state of a run.
FOLDER = "compressed"
# The layers that predict further tokens. transformers does not run them, so their experts cannot be compressed.
FURTHER = "num_nextn_predict_layers"


def number_of_experts(header: ModelHeader) -> int:
    """Return E, the experts of each layer that has any.

    Raises:
        CheckpointError: The model is no mixture of experts, or one of another family.
    """
    kind, counts = header.config.get("model_type"), [header.config.get(key) for key in COUNTS]
    count = next((value for value in counts if type(value) is int and value > 1), None)
    if count is None:
        raise CheckpointError(
            "the model is not a mixture of experts",
            str(header.folder),
            f"a config.json with {', '.join(COUNTS[:-1])} or {COUNTS[-1]}",
        )
    if kind not in SCORES:
        raise CheckpointError(
            f"mixtures of experts of type {kind!r} cannot be compressed", str(header.folder), f"one of {NAMES}"
        )
    return count


def routing_groups(header: ModelHeader) -> int:
    """Return the number of groups of experts of which a router first chooses some (DeepSeek-V3), else 1."""
    groups = header.config.get("n_group")
    return groups if type(groups) is int and groups > 0 else 1


def experts_kept(header: ModelHeader, settings: Compression) -> int:
    """Return N, the experts that are left in each layer.

    Raises:
        CheckpointError: See `number_of_experts`.
        ConfigError: The model has fewer experts, or N is too small for its router or for the method.
    """
    count, groups = number_of_experts(header), routing_groups(header)
    kept = settings.experts if isinstance(settings.experts, int) else max(1, int(count * settings.experts))
    least, why = _least(header.config, groups)
    if kept > count:
        raise ConfigError(f"{kept} experts are to be left of {count}", "compress.experts", f"at most {count}")
    if kept < least:
        raise ConfigError(f"{kept} of {count} experts would be left", "compress.experts", f"at least {least}, {why}")
    if kept % groups:
        raise ConfigError(
            f"{kept} of {count} experts would be left",
            "compress.experts",
            f"a multiple of {groups}, the groups of the router",
        )
    if settings.method == "ream" and kept * settings.group_size < count:
        raise ConfigError(
            f"{kept} groups of at most {settings.group_size} experts do not hold all {count}",
            "compress.group_size",
            f"at least {-(-count // kept)}",
        )
    return kept


def smaller_config(config: dict[str, Any], kept: int) -> dict[str, Any]:
    """Return a config.json with N experts in each layer, and without layers that predict further tokens."""
    changed = {key: kept for key in COUNTS if type(config.get(key)) is int}
    return config | changed | ({FURTHER: 0} if FURTHER in config else {})


def _least(config: dict[str, Any], groups: int) -> tuple[int, str]:
    """Return the fewest experts from which the router can choose, and why."""
    top = config.get("num_experts_per_tok")
    top = top if type(top) is int else 1
    if groups == 1:
        return top, "the experts of a token"
    chosen = config.get("topk_group")
    chosen = chosen if type(chosen) is int and chosen > 0 else groups
    # A group counts by its two best experts, and the experts of a token come from the chosen groups.
    return groups * max(2, -(-top // chosen)), "the experts of a token, from the groups that the router chooses"
