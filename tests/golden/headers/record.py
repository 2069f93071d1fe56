"""Write the headers of the published base models: names, shapes and types of their tensors, without weights.

    python tests/golden/headers/record.py

No hub is contacted. The headers are derived: transformers builds the module on the meta device from the published
config.json and maps its parameters to their names in files. OpenGVLab's original InternVL has no class in transformers;
its vision tower and projector are written out here after its modeling files (OpenGVLab/InternVL,
internvl_chat/internvl/model/internvl_chat/), and its language model is transformers' Qwen2.

The headers were compared with these sources; the numbers in `PUBLIC` are checked at each run:
- Qwen2-VL-7B: all 730 names and the 16,582,751,232 bytes of the model.safetensors.index.json of a fine-tuned sibling
  (BrianYAU-NTEC/olmOCR on GitHub) with the published config.json. The base's index has the same size (56.5 kB).
- Mistral-7B-v0.1: the 291 tensors and 14,483,464,192 bytes of the index of Mistral-7B-Instruct-v0.2.
- InternVL2_5-1B: the modules and shapes of InternVL3-1B, which are the same, as printed in InternVL3-1B_data.md of
  shivangjhalani/multicoco on GitHub; the names of the vision tower and the projector in the index of a larger
  InternVL2.5 in uv/ICT_note.md of cuijunjie18/my_notebook; the 938 M parameters and 1.88 GB of the hub's page.

It is an assumption that the experts' files have the base's names, shapes and types. The published code subtracts their
parameters from the base's one by one, so the names in modules and the shapes agree. The config.json here holds only the
keys that decide names, shapes and blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

HERE = Path(__file__).parent
# Public totals: exact from the files' indices, or rounded from the hub's pages.
PUBLIC = {
    "mistral-7b": {"tensors": 291, "bytes": 14_483_464_192},
    "qwen2-vl-7b": {"tensors": 730, "bytes": 16_582_751_232},
    "internvl2_5-1b": {"millions": 938, "gigabytes": 1.88},
}
# Number of safetensors files of the base on the hub.
FILES = {"mistral-7b": 2, "qwen2-vl-7b": 5, "internvl2_5-1b": 1}

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 3584,
    "image_token_id": 151655,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "in_chans": 3,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vocab_size": 152064,
}
INTERNVL = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "force_image_size": 448,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151674,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "torch_dtype": "bfloat16",
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "model_type": "intern_vit_6b",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}

Shapes = dict[str, tuple[int, ...]]


def shapes_in_files(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of a model that transformers has a class for, by the tensors' names in its files."""
    with accelerate.init_empty_weights(include_buffers=False):
        kind = getattr(transformers, config["architectures"][0])
        model = kind(kind.config_class.from_dict(dict(config)))
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def shapes_of_internvl(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of OpenGVLab's original InternVL, by the tensors' names in its files."""
    vision, text = config["vision_config"], shapes_in_files(config["llm_config"])
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, patches + 1, width),
        **_shapes(nn.Conv2d, "vision_model.embeddings.patch_embedding", 3, width, patch),
    }
    for block in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{block}"
        shapes |= {f"{at}.ls1": (width,), f"{at}.ls2": (width,)}
        shapes |= _shapes(nn.Linear, f"{at}.attn.qkv", width, 3 * width, vision["qkv_bias"])
        shapes |= _shapes(nn.Linear, f"{at}.attn.proj", width, width)
        shapes |= _shapes(nn.Linear, f"{at}.mlp.fc1", width, inner)
        shapes |= _shapes(nn.Linear, f"{at}.mlp.fc2", inner, width)
        shapes |= _shapes(nn.LayerNorm, f"{at}.norm1", width) | _shapes(nn.LayerNorm, f"{at}.norm2", width)
    shapes |= {f"language_model.{name}": shape for name, shape in text.items()}
    # Pixel unshuffle joins the patches of a square into one.
    side = round(1 / config["downsample_ratio"])
    seen, hidden = width * side**2, config["llm_config"]["hidden_size"]
    shapes |= _shapes(nn.LayerNorm, "mlp1.0", seen)
    shapes |= _shapes(nn.Linear, "mlp1.1", seen, hidden) | _shapes(nn.Linear, "mlp1.3", hidden, hidden)
    return shapes


def _shapes(module: type[nn.Module], name: str, *arguments: Any) -> Shapes:
    built = module(*arguments, device="meta")
    return {f"{name}.{part}": tuple(tensor.shape) for part, tensor in built.state_dict().items()}


def compact(shapes: Shapes) -> list[list[Any]]:
    """Return rows of [name with {} for the block's number, number of blocks or null, shape, type] in module order."""
    counts: dict[str, int] = {}
    for name in shapes:
        pattern = re.sub(r"(?<=layers\.|blocks\.)\d+", "{}", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        [pattern, count if "{}" in pattern else None, list(shapes[pattern.replace("{}", "0")]), "BF16"]
        for pattern, count in counts.items()
    ]


def make() -> dict[str, dict[str, Any]]:
    """Return the headers by the names of their recipes, checked against `PUBLIC`."""
    records = {}
    for name, config in (("mistral-7b", MISTRAL), ("qwen2-vl-7b", QWEN), ("internvl2_5-1b", INTERNVL)):
        shapes = shapes_of_internvl(config) if config is INTERNVL else shapes_in_files(config)
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        totals = {
            "tensors": len(shapes),
            "bytes": 2 * parameters,
            "millions": round(parameters / 1e6),
            "gigabytes": round(2 * parameters / 1e9, 2),
        }
        for what, public in PUBLIC[name].items():
            assert totals[what] == public, f"{name}: {totals[what]} {what}, published: {public}"
        records[name] = {"files": FILES[name], "config": config, "tensors": compact(shapes)}
    return records


def as_text(record: Mapping[str, Any]) -> str:
    """Return JSON with one tensor per line."""
    lines = ",\n".join("    " + json.dumps(tensor) for tensor in record["tensors"])
    head = json.dumps({key: value for key, value in record.items() if key != "tensors"}, indent=2)
    return f'{head[:-2]},\n  "tensors": [\n{lines}\n  ]\n}}\n'


if __name__ == "__main__":
    for name, record in make().items():
        (HERE / f"{name}.json").write_text(as_text(record), encoding="utf-8")
