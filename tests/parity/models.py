"""Tiny random models of the kinds that the configs name: WORK/m/FAMILY LAYERS[t]-DTYPE/{base, e1, e2c, lora1, …}.

`t`: the head is tied to the embedding. An expert is the base with noise on every tensor; one whose name ends in `c` has
two ChatML tokens more and another chat template.
"""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "the quick brown fox jumps over the lazy dog while models are merged by weight and layers are stacked "
    "one after another so that tokens of every vocabulary find their embedding again in the output head "
) * 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}{% endfor %}"
# Special tokens beyond those of every tokenizer, and the chat template.
TOKENS: dict[str, tuple[list[str], str]] = {
    "plain": ([], PLAIN),
    "chatml": (["<|im_start|>", "<|im_end|>"], CHATML),
    "headers": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], PLAIN),
}
VOCAB = 320
HEAD = {"head_dim": 8}
SCALAR = {"query_pre_attn_scalar": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llamah": ("LlamaConfig", {}),  # with the header tokens of Llama 3
    "mistral": ("MistralConfig", HEAD),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", HEAD),
    "gemma2": ("Gemma2Config", HEAD | SCALAR),
    "gemma3": ("Gemma3TextConfig", HEAD | SCALAR),
    "mixtral": ("MixtralConfig", HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Kind:
    """What the name of a folder of models says: `llama6t-bf16` is a Llama of 6 layers with a tied head."""

    family: str
    layers: int
    tied: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str) -> Kind:
        """Return the kind with this name. A family's name may end in a digit, so that all are tried."""
        for family in sorted(FAMILIES, key=len, reverse=True):
            if match := re.fullmatch(rf"{family}(\d+)(t?)-(\w+)", name):
                return cls(family, int(match[1]), bool(match[2]), DTYPES[match[3]])
        raise ValueError(name)

    def config(self, vocab: int) -> Any:
        """Return the transformers config of the models."""
        name, extra = FAMILIES[self.family]
        return getattr(transformers, name)(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=self.tied,
            **extra,
        )


def make_models(work: Path, index: Mapping[str, Mapping[str, Any]], configs: Iterable[str]) -> None:
    """Make the models that these configs of the index name, where they are missing."""
    wanted: dict[str, set[str]] = {}
    for config in configs:
        wanted.setdefault(index[config]["models"], {"base"}).update(index[config]["needs"])
    for kind, names in wanted.items():
        make(work / "m" / kind, names)


def make(folder: Path, names: Collection[str]) -> None:
    """Make models in a folder whose name says of which kind they are, where they are missing."""
    missing = sorted(name for name in names if not (folder / name / "done").exists())
    if not missing:
        return
    transformers.utils.logging.disable_progress_bar()
    kind = Kind.of(folder.name)
    tokenizer = make_tokenizer("headers" if kind.family == "llamah" else "plain", kind)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(kind.config(len(tokenizer)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for name in missing:
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        seed = sum(map(ord, name)) * 7 + int(re.sub(r"\D", "", name) or 0)
        if name.startswith("lora"):
            _save_adapter(base, out, seed)
        else:
            model, own = (base, tokenizer) if name == "base" else _expert(base, name, seed, tokenizer, kind)
            _save(model, out, kind.dtype)
            own.save_pretrained(out)
        (out / "done").write_text("")


def make_tokenizer(tokens: str, kind: Kind) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and frequent pairs, with the special tokens and the chat template of `TOKENS`."""
    tokenizer = Tokenizer(BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", *(["<|endoftext|>"] if kind.family.startswith("qwen") else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    added, fast.chat_template = TOKENS[tokens]
    if added:
        fast.add_special_tokens({"additional_special_tokens": added})
    return fast


def _expert(base: Any, name: str, seed: int, tokenizer: Any, kind: Kind) -> tuple[Any, Any]:
    expert = copy.deepcopy(base)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    if name.endswith("c"):
        tokenizer = make_tokenizer("chatml", kind)
        torch.manual_seed(seed)
        expert.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return expert, tokenizer


def _save(model: Any, out: Path, dtype: torch.dtype) -> None:
    copy.deepcopy(model).to(dtype).save_pretrained(out)


def _save_adapter(base: Any, out: Path, seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    # PEFT asks for a property that transformers has renamed.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = get_peft_model(copy.deepcopy(base), lora)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.1)
    model.peft_config["default"].base_model_name_or_path = str(out.parent / "base")
    model.save_pretrained(out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
