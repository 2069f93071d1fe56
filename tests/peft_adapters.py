"""LoRA adapters of tiny models, written by peft, with the tensors of peft's own merge."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.adapters import WEIGHTS, AdapterHeader, read_adapter_header
from engine.checkpoints.headers import read_model_header


@dataclass(frozen=True)
class Built:
    """A base and an adapter on disk, and the base's tensors before and after peft's merge."""

    base: Path
    adapter: Path
    base_tensors: dict[str, Tensor]
    merged_tensors: dict[str, Tensor]

    def header(self) -> AdapterHeader:
        return read_adapter_header(self.adapter, read_model_header(self.base))


def gpt2(tied: bool = True) -> Any:
    """Make a tiny GPT-2. The layers of its blocks are Conv1D, which stores weights as [in, out]."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def build(folder: Path, model: Any, dtype: torch.dtype = torch.float32, save: Any = None, **options: Any) -> Built:
    """Build an adapter with random factors and save it with peft.

    Args:
        folder: The folder of base and adapter.
        model: The base.
        dtype: The factors' dtype in the file.
        save: Keyword arguments of `save_pretrained`.
        options: Keyword arguments of `LoraConfig`.
    """
    base = tiny.save(model, folder / "base")
    with warnings.catch_warnings():
        # peft warns about settings that it corrects itself: Conv1D's layout, tied embeddings.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_((torch.randn_like(parameter) * 0.2).to(dtype))
        adapted.save_pretrained(folder / "adapter", **(save or {}))
        merged = adapted.merge_and_unload().state_dict()
    if dtype != torch.float32:
        tensors = load_file(folder / "adapter" / WEIGHTS)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter" / WEIGHTS)
    return Built(base, folder / "adapter", load_file(base / "model.safetensors"), merged)
