"""Fine-tune SmolLM2-135M-Instruct in full: one expert per skill, and the model of mixture training.

`python benchmarks/quality/fine_tune.py [NAME ...]` writes `WORKDIR/models/<skill>` and `WORKDIR/models/mixture`,
float32 safetensors of 540 MB each, on a GPU or on CPU cores (on two cores about 4 minutes per expert and 10 for the
mixture). Existing models are kept. The mixture is trained on half as many examples of every skill as the skill's
expert, taking one example of each skill in turn.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tasks
import torch
from fetch_base import fetch
from train_experts import fit
from transformers import AutoModelForCausalLM, AutoTokenizer

WORKDIR = Path(tempfile.gettempdir()) / "expert-merging-benchmarks" / "quality"
MIXTURE = "mixture"
STEPS, MIXTURE_STEPS, LEARNING_RATE, SEED = 100, 250, 1e-4, 0
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


def mixture_stream() -> Iterator[tasks.Example]:
    """Yield one training example of each skill in turn."""
    streams = [tasks.training_stream(skill) for skill in tasks.SKILLS]
    return (example for examples in zip(*streams, strict=True) for example in examples)


def train(name: str, workdir: Path) -> None:
    """Train and save an expert or the mixture, unless it exists."""
    target = workdir / "models" / name
    if target.exists():
        return
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = base_model(workdir)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    steps = MIXTURE_STEPS if name == MIXTURE else STEPS
    examples = mixture_stream() if name == MIXTURE else tasks.training_stream(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
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
    for wanted in sys.argv[1:] or [*tasks.SKILLS, MIXTURE]:
        train(wanted, folder)
