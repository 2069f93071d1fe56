"""Fine-tune SmolLM2-135M-Instruct: one expert per skill, and the models of mixture training.

`python benchmarks/quality/fine_tune.py [NAME ...]` writes `WORKDIR/models/NAME`, on a GPU or on CPU cores. A name is

- a skill: an expert trained in full, float32 safetensors of 540 MB (on two cores about 4 minutes);
- `SKILL-r8` or `SKILL-r16`: an expert as a LoRA adapter of that rank, which needs the extra `.[train]` (peft);
- `mixture` or `mixture-b`: a model trained in full on half as many examples of every skill of a bench as the skill's
  expert, taking one example of each skill in turn.

The default is all of bench A in full. Existing models are kept.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tasks
import torch
from fetch_base import fetch
from train_experts import fit
from transformers import AutoModelForCausalLM, AutoTokenizer

WORKDIR = Path(tempfile.gettempdir()) / "expert-merging-benchmarks" / "quality"
# The model of mixture training, by bench.
MIXTURES = {"a": "mixture", "b": "mixture-b"}
STEPS, LEARNING_RATE, SEED = 100, 1e-4, 0
ADAPTER_RATE = 1e-3
# The model's own chat template would put the same system prompt of 25 tokens before every question.
CHAT_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def base_model(workdir: Path) -> Path:
    """Return the folder of the base with the short chat template, written on first use."""
    target = workdir / "models" / "base"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".base-") as scratch:
            ready = Path(scratch) / "base"
            shutil.copytree(fetch(), ready)
            (ready / "chat_template.jinja").write_text(CHAT_TEMPLATE)
            ready.rename(target)
    return target


def mixture_stream(bench: str) -> Iterator[tasks.Example]:
    """Yield one training example of each skill in turn."""
    streams = [tasks.training_stream(skill) for skill in tasks.BENCHES[bench]]
    return (example for examples in zip(*streams, strict=True) for example in examples)


def adapted(model: Any, rank: int) -> Any:
    """Return the model with a trainable LoRA adapter on all linear layers."""
    import peft

    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )


def train(name: str, workdir: Path) -> None:
    """Train and save an expert or a mixture, unless it exists."""
    target = workdir / "models" / name
    if target.exists():
        return
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = base_model(workdir)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    skill, _, rank = name.partition("-r")
    if rank:
        model, rate = adapted(model, int(rank)), ADAPTER_RATE
    else:
        rate = LEARNING_RATE
    model.to(device)
    bench = next((bench for bench, mixture in MIXTURES.items() if mixture == name), None)
    examples = mixture_stream(bench) if bench else tasks.training_stream(skill)
    steps = STEPS * len(tasks.BENCHES[bench]) // 2 if bench else STEPS
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    # Without instructions for bfloat16, a CPU emulates it many times slower than float32.
    has_bfloat16 = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    fit(name, model, tokenizer, examples, steps, optimizer, autocast=has_bfloat16)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        ready = Path(scratch) / name
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        ready.rename(target)


if __name__ == "__main__":
    folder = Path(os.environ.get("QUALITY_WORKDIR", WORKDIR))
    for wanted in sys.argv[1:] or [*tasks.BENCHES["a"], MIXTURES["a"]]:
        train(wanted, folder)
