"""Families of transformers, tiny: the expert's logits are transformers', a step learns, the written output loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
import yaml
from conftest import plan_of
from errors import refused
from plain import Plain
from weight_space import combine

from engine.checkpoints.structure import by_names
from engine.errors import CheckpointError
from engine.learning.frozen_expert import FrozenExpert, check_models
from engine.models.names import structure_of
from engine.models.skeleton import build_module

pytestmark = pytest.mark.usefixtures("one_thread")

# In these, a mistake in one part of the engine shows soonest; the other families are slow tests.
QUICK = {"bloom", "gpt2", "opt", "llama4_text", "lfm2_moe", "llava"}
HEAD = {"head_dim": 8}
TWO = {"num_experts_per_tok": 2}
ROUTED = TWO | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
ROUTED |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
EXPERTS = TWO | {"num_experts": 4}
SHARED = EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
HYBRID = {"num_hidden_layers": 4, "full_attention_interval": 2}
LOCAL = TWO | {"num_local_experts": 4}
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
# Keys of each family's config besides `tiny.COMMON`.
CAUSAL: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {},
    "cwm": {},
    "deepseek_v2": ROUTED | LATENT | {"num_key_value_heads": 4},
    "deepseek_v3": ROUTED | LATENT | {"num_key_value_heads": 4},
    "diffllama": {},
    "dots1": ROUTED | HEAD,
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "glm": {},
    "glm4": {},
    "glm4_moe": ROUTED | HEAD,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": LOCAL | HEAD,
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {},
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "jamba": EXPERTS | PERIODS | {"num_hidden_layers": 4, "mamba_dt_rank": 4},
    "lfm2": {},
    "lfm2_moe": EXPERTS
    | {"layer_types": ["conv", "full_attention", "conv"], "moe_intermediate_size": 24, "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "minimax": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": LOCAL,
    "mpt": {},
    "nemotron": {},
    "nemotron_h": ROUTED
    | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "moe_shared_expert_intermediate_size": 24,
    }
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "head_dim": 8},
    "olmo": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": LOCAL,
    "qwen2": {},
    "qwen2_moe": SHARED,
    "qwen3": HEAD,
    "qwen3_moe": EXPERTS | HEAD | {"moe_intermediate_size": 24},
    "qwen3_next": SHARED | HEAD | LINEAR | HYBRID,
    "recurrent_gemma": {},
    "rwkv": {},
    "seed_oss": HEAD,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": HEAD,
    "xglm": {"ffn_dim": 48},
}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = {key: CLIP[key] for key in CLIP if key != "projection_dim"} | {"model_type": "pixtral"}
# A token that no calibration record has stands for an image.
# Text, vision and other keys of the models that take images; those in `tests/tiny_images.py` have tests of their own.
IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "aya_vision": ({"model_type": "cohere2"}, SIGLIP, {"image_token_index": 2, "downsample_factor": 1}),
    "idefics3": ({"model_type": "llama"}, SIGLIP | {"model_type": "idefics3_vision"}, {"image_token_id": 2}),
    "llava": ({"model_type": "llama"}, CLIP, {"image_token_index": 2}),
    "llava_next": ({"model_type": "mistral"}, CLIP, {"image_token_index": 2}),
    "mistral3": ({"model_type": "mistral"}, PIXTRAL, {"image_token_index": 2, "spatial_merge_size": 1}),
    "paligemma": ({"model_type": "gemma"}, SIGLIP, {"image_token_index": 2, "projection_dim": 32}),
    "smolvlm": ({"model_type": "llama"}, SIGLIP | {"model_type": "smolvlm_vision"}, {"image_token_id": 2}),
    "vipllava": ({"model_type": "llama"}, CLIP, {"image_token_index": 2, "vision_feature_layers": [-1, -2]}),
}


def config_of(family: str) -> Any:
    if family in CAUSAL:
        return transformers.AutoConfig.for_model(family, **(tiny.COMMON | CAUSAL[family]))
    text, vision, top = IMAGES[family]
    return transformers.AutoConfig.for_model(family, text_config=tiny.COMMON | text, vision_config=vision, **top)


def noisy(model: Any, seed: int) -> Any:
    """Add noise to every parameter; transformers starts many of them at 0 or 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def write(folder: Path) -> Path:
    """Write a config that learns coefficients of the expert `tuned`, and return its path."""
    tiny.write_calibration(folder / "tuned.jsonl", 1, seed=0)
    entry = {"model": "tuned", "calibration": "tuned.jsonl", "parameters": {"weight": 0.5}}
    keys = {"merge_method": "expert_merging", "preset": "paper", "base_model": "base", "models": [entry]}
    (folder / "learned.yaml").write_text(yaml.safe_dump(keys))
    return folder / "learned.yaml"


@pytest.mark.slow
def test_hidden_states_of_several_streams_are_refused_and_can_be_left_out(tmp_path: Path) -> None:
    keys = HEAD | {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    keys |= {"laurel_rank": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    config = transformers.Gemma3nTextConfig(**(tiny.COMMON | keys), activation_sparsity_pattern=[0.0] * 3)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in ("base", "tuned"):
        noisy(base, seed=1).save_pretrained(tmp_path / name)
    with refused(CheckpointError, where="hidden_layers", do="hidden_layers: []", facts=["Gemma3n"]):
        Plain(plan_of(write(tmp_path)), tmp_path)
    learned = Plain(plan_of(write(tmp_path), "parameters.hidden_layers=[]"), tmp_path).run()[0]
    assert abs(learned.values - 0.5).max() > 0.01


@pytest.mark.parametrize("family", ["modernbert-decoder", "bert", "electra"])
def test_a_head_of_several_layers_is_refused(tmp_path: Path, family: str) -> None:
    config = transformers.AutoConfig.for_model(family, **tiny.COMMON)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in ("base", "tuned"):
        base.save_pretrained(tmp_path / name)
    with refused(CheckpointError, do="weight-space", facts=[type(base).__name__]):
        check_models(plan_of(write(tmp_path)))


@pytest.mark.parametrize(
    "family",
    [family if family in QUICK else pytest.param(family, marks=pytest.mark.thorough) for family in CAUSAL | IMAGES],
)
def test_a_family_runs_learns_and_loads(tmp_path: Path, family: str) -> None:
    auto = transformers.AutoModelForCausalLM if family in CAUSAL else transformers.AutoModelForImageTextToText
    base = noisy(auto.from_config(config_of(family), dtype=torch.float32), seed=0)
    base.save_pretrained(tmp_path / "base")
    noisy(base, seed=1).save_pretrained(tmp_path / "tuned")
    plan = plan_of(write(tmp_path))
    tuned = auto.from_pretrained(tmp_path / "tuned", dtype=torch.float32).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        frozen = FrozenExpert(plan, 0, torch.device("cpu")).model(input_ids=ids).logits
        torch.testing.assert_close(frozen, tuned(input_ids=ids).logits, rtol=1e-5, atol=1e-5)

    learned = Plain(plan, tmp_path).run()[0]
    assert abs(learned.values - 0.5).max() > 0.01

    entry = {"model": "tuned", "parameters": {"weight": 1.0}}
    keys = {"merge_method": "task_arithmetic", "base_model": "base", "models": [entry]}
    (tmp_path / "arithmetic.yaml").write_text(yaml.safe_dump(keys))
    out = combine(plan_of(tmp_path / "arithmetic.yaml"), tmp_path / "out")
    shutil.copy(tmp_path / "base" / "config.json", out)
    merged, loading = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    parameters = dict(merged.named_parameters())
    for name, parameter in tuned.named_parameters():
        torch.testing.assert_close(parameters[name], parameter)
    header = plan.base_header
    by_name, certain = by_names(header.tensors)
    of_model = structure_of(build_module(base.config, header.folder), header.tensors, header.folder)
    assert header.roles == of_model.roles
    assert not certain or by_name.roles == of_model.roles, "names that need no model tell the same"
    assert not any(header.roles.get(name) for name in plan.merged)
    assert safetensors.torch.load_file(out / "model.safetensors").keys() == header.tensors.keys()
