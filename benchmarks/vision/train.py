"""Train the base, four experts, their LoRA versions and the model of mixture training, on a CPU core.

`python benchmarks/vision/train.py [NAME ...]` writes `WORKDIR/models/NAME`; existing models are kept. The base sees,
but has none of the skills: its vision tower and projector learn to name what a cell holds, then the rest learns to
describe pictures, to name a cell's content and to repeat words. Experts learn one skill each, with a quarter of their
examples from the base's data. They keep the base's vision tower, as a learned merge does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
from model import VOCABULARY, Row, build, inputs, pixels, save_processor
from pictures import GRID, KINDS, SKILLS, Picture, descriptions, training_stream
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, get_cosine_schedule_with_warmup

WORKDIR = Path(tempfile.gettempdir()) / "expert-merging-benchmarks" / "vision"
MIXTURE, ADAPTER = "mixture", "-lora"
BATCH, SEED = 32, 0
# Optimiser steps and learning rate by kind of model; those of the cells come before those of the base.
CELLS, BASE, EXPERT, LORA, MIXED = (250, 2e-3), (800, 2e-3), (250, 1e-3), (150, 2e-3), (400, 1e-3)
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj|.*multi_modal_projector\.linear_\d"


def fit(name: str, parameters: Any, losses: Iterator[Any], steps: int, rate: float) -> None:
    """Take `steps` steps of AdamW on losses, with warm-up and cosine decay."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # Parameters without gradients, such as the language model's while cells are named, are left as they are.
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
    schedule, began = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps), time.monotonic()
    for step, loss in enumerate(islice(losses, steps), 1):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"{name} step {step}/{steps} loss {loss.item():.4f} {time.monotonic() - began:.0f} s", flush=True)


def autocast() -> Any:
    # Without instructions for bfloat16, a CPU emulates it many times slower than float32.
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False))


def cell_losses(model: Any) -> Iterator[Any]:
    """Yield the losses of naming what each cell holds: its image token against the embeddings of words.

    Image tokens so lie near the words for what they show, from which the language model can copy.
    """
    targets_KV = torch.zeros(len(KINDS), len(VOCABULARY))
    for kind, words in enumerate(KINDS):
        named = [VOCABULARY[word] for word in words.split() or ["nothing"]]
        targets_KV[kind, named] = 1 / len(named)
    stream, inner = descriptions(), model.model
    while True:
        batch = [picture for picture, _, _ in islice(stream, BATCH)]
        with autocast():
            patches_BPH = inner.vision_tower(pixels([p.image for p in batch])).last_hidden_state[:, 1:]
            grid = inner.pixel_shuffle(patches_BPH.unflatten(1, (2 * GRID, 2 * GRID)), scale_factor=0.5)
            tokens_BCH = inner.multi_modal_projector(grid.flatten(1, 2))
            logits_BCV = model.lm_head(tokens_BCH).float()
        cells_BC = torch.tensor([p.cells for p in batch])
        yield cross_entropy(logits_BCV.flatten(0, 1), targets_KV[cells_BC.flatten()])


def answer_losses(model: Any, rows: Iterator[Row]) -> Iterator[Any]:
    """Yield the losses of answers, in nats per token."""
    while True:
        with autocast():
            yield model(**inputs(list(islice(rows, BATCH)))).loss


def rows_of(skills: list[str]) -> Iterator[Row]:
    """Yield training examples of the skills in turn, and after each three one of the base's."""
    streams, replayed, number = [training_stream(skill) for skill in skills], descriptions(), 0
    while True:
        for stream in streams:
            picture: Picture = next(stream)
            yield picture.image, picture.question, picture.answer
            number += 1
            if number % 3 == 0:
                other, question, answer = next(replayed)
                yield other.image, question, answer


def make_base() -> Any:
    """Train the base from random weights."""
    model = build()
    fit("cells", model.parameters(), cell_losses(model), *CELLS)
    freeze_tower(model)
    rows = ((picture.image, question, answer) for picture, question, answer in descriptions())
    fit("base", model.parameters(), answer_losses(model, rows), *BASE)
    return model


def freeze_tower(model: Any) -> None:
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)


def make_expert(name: str, base: Path) -> Any:
    """Train an expert, its LoRA version or the mixture from the base, with the base's vision tower."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    freeze_tower(model)
    skill, adapter = name.removesuffix(ADAPTER), name.endswith(ADAPTER)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=ADAPTED))
    rows = rows_of(list(SKILLS) if name == MIXTURE else [skill])
    schedule = LORA if adapter else MIXED if name == MIXTURE else EXPERT
    fit(name, model.parameters(), answer_losses(model, rows), *schedule)
    return model


def train(name: str, workdir: Path = WORKDIR) -> Path:
    """Return the folder of a model, trained on first use."""
    target = workdir / "models" / name
    if not target.exists():
        base = target if name == "base" else train("base", workdir)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        model = make_base() if name == "base" else make_expert(name, base)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            ready = Path(scratch) / name
            model.save_pretrained(ready)
            if not name.endswith(ADAPTER):
                save_processor(ready)
            ready.rename(target)
    return target


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["base", *SKILLS, MIXTURE, *(f"{skill}{ADAPTER}" for skill in SKILLS)]:
        train(wanted)
