"""Models of 1B to 70B that have headers and no data: sparse files, which take no disk space. `plan` reads no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

TOKENS, SAMPLES, RANK = 512, 8, 16


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; `kv` is the width of keys and values."""

    hidden: int
    layers: int
    inner: int
    kv: int
    vocab: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of all linear layers by name."""
        block = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}


# Llama 3.2 1B, Llama 2 7B, Qwen2.5 14B and 32B, Llama 2 70B.
SHAPES = {
    "1B": Shape(2048, 16, 8192, 512, 128256),
    "7B": Shape(4096, 32, 11008, 4096, 32000),
    "14B": Shape(5120, 48, 13824, 1024, 152064),
    "32B": Shape(5120, 64, 27648, 1024, 152064),
    "70B": Shape(8192, 80, 28672, 1024, 32000),
}


def write_merge(folder: Path, shape: Shape, k: int, adapters: bool = False) -> Path:
    """Write a base and K experts, all with the default options, and return the merge.yaml.

    Full experts are links to the base; adapters have LoRA factors of rank 16 of all linear layers.
    """
    base = folder / "base"
    named = {f"{name}.weight": size for name, size in shape.matrices().items()}
    named |= {f"{name}.weight": (shape.vocab, shape.hidden) for name in ("model.embed_tokens", "lm_head")}
    _write_weights(base / "model.safetensors", named)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocab,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.inner,
    }
    (base / "config.json").write_text(json.dumps(config))
    (folder / "samples.jsonl").write_text((json.dumps({"input_ids": [1] * TOKENS}) + "\n") * SAMPLES)
    entries = []
    for index in range(k):
        if adapters:
            _write_adapter(folder / f"expert{index}", shape)
        else:
            (folder / f"expert{index}").symlink_to(base, target_is_directory=True)
        entries.append({"model": f"expert{index}", "name": f"expert{index}", "calibration": "samples.jsonl"})
    whole = {"merge_method": "expert_merging_pp", "base_model": "base", "models": entries}
    (folder / "merge.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder / "merge.yaml"


def _write_adapter(folder: Path, shape: Shape) -> None:
    sides = {}
    for name, (rows, columns) in shape.matrices().items():
        sides[f"base_model.model.{name}.lora_A.weight"] = (RANK, columns)
        sides[f"base_model.model.{name}.lora_B.weight"] = (rows, RANK)
    _write_weights(folder / "adapter_model.safetensors", sides)
    modules = sorted({name.rsplit(".", 1)[1] for name in shape.matrices()})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_weights(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a safetensors file of bfloat16 tensors whose data is a hole."""
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        nbytes = 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + nbytes]}
        end += nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
