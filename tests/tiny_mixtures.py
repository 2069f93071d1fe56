"""Tiny random mixtures of experts of the families that can be made smaller, with routers that spread their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
# The class of the config, the key of the number of experts, and other keys.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "num_experts", {"head_dim": 8, "moe_intermediate_size": 24}),
    "mixtral": ("MixtralConfig", "num_local_experts", {"head_dim": 8}),
    "olmoe": ("OlmoeConfig", "num_experts", {}),
    "deepseek_v3": ("DeepseekV3Config", "n_routed_experts", LATENT | DEEPSEEK | {"n_group": 2, "topk_group": 1}),
}


def make_mixture(family: str, experts: int = 8, top: int = 2, seed: int = 0, **more: Any) -> Any:
    """Make a model of a family with two blocks of experts, of which each token has `top`."""
    name, key, own = FAMILIES[family]
    common = {**tiny.COMMON, "num_hidden_layers": 3 if family == "deepseek_v3" else 2, "num_experts_per_tok": top}
    common |= {key: experts, "norm_topk_prob": True} | own | more
    if family == "mixtral":
        del common["norm_topk_prob"]
    if family in ("deepseek_v3", "olmoe"):
        common["num_key_value_heads"] = common["num_attention_heads"]
    config = getattr(transformers, name)(**common)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.05)
    return model


def mixtures(model: Any) -> list[Any]:
    """Return the modules of a model that have experts."""
    return [module for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]


@torch.no_grad()
def pair_up(model: Any, seed: int = 1, permuted: bool = True) -> Any:
    """Make expert 2·i + 1 of every layer equal to expert 2·i, its hidden units permuted.

    The last feature of every hidden state is made positive, and the router scores the second expert of a pair lower by
    it, so that no token chooses that one: of equal scores, torch chooses any.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[-1] = 0
    model.get_input_embeddings().weight[:, -1] = 0.1
    for module in mixtures(model):
        experts, router = module.experts, module.gate
        experts.down_proj[:, -1] = 0
        units = experts.down_proj.shape[2]
        for expert in range(0, len(router.weight), 2):
            order = torch.randperm(units, generator=generator) if permuted else torch.arange(units)
            both = torch.cat([order, units + order])
            experts.gate_up_proj[expert + 1] = experts.gate_up_proj[expert][both]
            experts.down_proj[expert + 1] = experts.down_proj[expert][:, order]
            router.weight[expert, -1] = 0
            router.weight[expert + 1] = router.weight[expert]
            router.weight[expert + 1, -1] = -0.5
            if hasattr(router, "e_score_correction_bias"):
                router.e_score_correction_bias[expert + 1] = router.e_score_correction_bias[expert]
    return model


def save_mixture(model: Any, folder: Path, fused: bool = False) -> Path:
    """Save a model with a tokenizer, with a tensor for each expert and projection, or `fused` as in memory."""
    model.save_pretrained(folder, save_original_format=not fused)
    tiny.save_tokenizer(folder)
    return folder
