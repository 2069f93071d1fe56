"""Tiny random models of real architectures, with experts, tokenizers and calibration files."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 8}
MIXTURE = {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", HEAD),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", HEAD),
    "gemma2": ("Gemma2Config", HEAD | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", HEAD | {"query_pre_attn_scalar": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", HEAD | MIXTURE | {"num_experts": 4, "moe_intermediate_size": 24}),
    "mixtral": ("MixtralConfig", HEAD | MIXTURE | {"num_local_experts": 4}),
}


def make_model(family: str = "llama", tied: bool = False, seed: int = 0) -> Any:
    """Make a model with weights large enough for its blocks to affect the output; `tied`: embedding and head."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**COMMON, **extra, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def make_expert(base: Any, seed: int, scale: float = 0.05) -> Any:
    """Return the base with noise on every weight except head and embedding, as in most fine-tunes."""
    config = type(base.config).from_dict(base.config.to_dict())
    expert = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expert.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    frozen = {
        id(p) for p in (*expert.get_input_embeddings().parameters(), *expert.get_output_embeddings().parameters())
    }
    with torch.no_grad():
        for parameter in expert.parameters():
            if id(parameter) not in frozen:
                parameter.add_(torch.randn_like(parameter) * scale)
    return expert


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32, sharded: bool = False) -> Path:
    """Save the model with transformers, and return the folder; `sharded`: in several files with an index."""
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
    model.to(torch.float32)
    return folder


def save_tokenizer(folder: Path, chat: bool = True) -> None:
    """Save a word tokenizer of the tiny vocabulary, with a chat template if `chat`."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user:", "assistant:", *(f"w{i}" for i in range(VOCAB - 6))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} </s> {% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    tokenizer.save_pretrained(folder)


def write_calibration(path: Path, samples: int, seed: int, length: int = 9) -> Path:
    """Write records of random `input_ids` with different lengths, and return the file's path."""
    generator = torch.Generator().manual_seed(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(samples):
            ids = torch.randint(3, VOCAB, (length + i % 3,), generator=generator).tolist()
            file.write(json.dumps({"input_ids": ids}) + "\n")
    return path


@cache
def _models(family: str, experts: int, tied: bool, sharded: bool, dtype: torch.dtype) -> Path:
    """Return a folder with a base and its experts, made once per process; callers copy it."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base = make_model(family, tied)
    save(base, folder / "base", dtype, sharded)
    save_tokenizer(folder / "base")
    for k in range(experts):
        save(make_expert(base, seed=k + 1), folder / f"expert{k}", dtype, sharded)
    return folder


def make_merge(
    folder: Path,
    family: str = "llama",
    experts: int = 2,
    samples: Sequence[int] = (4, 3, 5, 2),
    tied: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a base, its experts, calibration files and a merge.yaml, and return the path of merge.yaml."""
    shutil.copytree(_models(family, experts, tied, sharded, dtype), folder, dirs_exist_ok=True)
    # The random numbers that a test draws next do not depend on whether the models were there already.
    torch.manual_seed(experts)
    models = []
    for k in range(experts):
        write_calibration(folder / f"expert{k}.jsonl", samples[k], seed=k)
        models.append(
            {"model": f"expert{k}", "calibration": f"expert{k}.jsonl", "parameters": {"weight": 0.2 + 0.1 * k}}
        )
    # With these options, the coefficients of tiny random models change a little at every step.
    defaults: dict[str, Any] = {"merge_method": "expert_merging_pp", "base_model": "base", "preset": "paper"}
    defaults["models"] = models
    parameters = {"learning_rate": 0.1, "gradient_accumulation": 3, "hidden_layers": [1, 2], "regularization": 0.5}
    merged = {**defaults, "parameters": parameters | config.pop("parameters", {}), **config}
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    return path
