"""LoRA adapters of tiny models, written by peft, with the tensors of peft's own merge."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.adapter_file import WEIGHTS
from engine.checkpoints.adapters import AdapterHeader, is_adapter, read_adapter_header
from engine.checkpoints.headers import read_model_header
from engine.checkpoints.tensors import Checkpoint
from engine.task_vectors.experts import AdapterExpert

IDS = [5, 6, 7, 8, 9]


@dataclass(frozen=True)
class Built:
    """A base and an adapter on disk, the base's tensors before and after peft's merge, and the trained model's logits.

    The logits are those of the tokens `IDS` before peft merges, which it does wrongly if embedding and head are tied.
    """

    base: Path
    adapter: Path
    base_tensors: dict[str, Tensor]
    merged_tensors: dict[str, Tensor]
    logits: Tensor

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


def build(
    folder: Path,
    model: Any,
    dtype: torch.dtype = torch.float32,
    save: Any = None,
    change: Callable[[Any], Any] = lambda adapted: None,
    config: Any = None,
    **options: Any,
) -> Built:
    """Build an adapter with random factors and save it with peft.

    Args:
        folder: The folder of base and adapter.
        model: The base.
        dtype: The factors' dtype in the file.
        save: Keyword arguments of `save_pretrained`.
        change: Changes the model with its adapter before it is saved.
        config: peft's config of another adapter than LoRA.
        options: Keyword arguments of `LoraConfig`.
    """
    base = tiny.save(model, folder / "base")
    with warnings.catch_warnings():
        # peft warns about settings that it corrects itself: Conv1D's layout, tied embeddings.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config or peft.LoraConfig(**options))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_((torch.randn_like(parameter) * 0.2).to(dtype))
                elif parameter.requires_grad:  # of modules_to_save, a bias, or another kind of adapter
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            change(adapted)
        adapted.save_pretrained(folder / "adapter", **(save or {}))
        logits = adapted.eval()(torch.tensor([IDS])).logits
        merged = adapted.merge_and_unload().state_dict()
    if dtype != torch.float32:
        tensors = load_file(folder / "adapter" / WEIGHTS)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter" / WEIGHTS)
    return Built(base, folder / "adapter", load_file(base / "model.safetensors"), merged, logits)


def cuts(numel: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of blocks of `size` elements."""
    return [(start, min(start + size, numel)) for start in range(0, numel, size)]


def assert_equals_peft(built: Built, changed: int) -> None:
    """Assert that every task vector is peft's merge minus the base; `changed` is the number of pairs."""
    header = built.header()
    expert = AdapterExpert(Checkpoint(built.adapter, header.tensors), header.pairs, header.whole)
    assert is_adapter(built.adapter) and not is_adapter(built.base)
    assert len(header.pairs) == changed
    for name, base in built.base_tensors.items():
        vector = expert.task_vector(name)
        expected = (built.merged_tensors[name] - base).reshape(-1)
        if vector is None:
            assert not expected.any(), name
            continue
        assert expected.abs().max() > 0.01, name
        numel, columns = base.numel(), base.shape[-1]
        for size in (numel, 37, columns, 2 * columns + 1, columns - 1):
            out = torch.full((numel,), torch.nan)
            for start, stop in cuts(numel, size):
                vector.block(start, stop, base.reshape(-1)[start:stop], out[start:stop])
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def adapters(config: Path, experts: int) -> None:
    """Replace all experts by adapters of some matrices, of different ranks."""
    for k in range(experts):
        target = config.parent / f"expert{k}"
        shutil.rmtree(target)
        torch.manual_seed(k)
        options = peft.LoraConfig(r=2 + k, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        base = transformers.AutoModelForCausalLM.from_pretrained(config.parent / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft calls
            peft.get_peft_model(base, options).save_pretrained(target)
