"""Train the base, four experts, their LoRA versions and the model of mixture training, on a CPU core.

`python benchmarks/vision/train.py [NAME ...]` writes `WORKDIR/models/NAME`; existing models are kept. The base sees,
but has none of the skills: its vision tower learns to name what a cell holds, then the whole model learns to describe
pictures, to name a cell's content and to repeat words. Experts learn one skill each, with a quarter of their batches
from the base's data, and keep the base's vision tower, which a merge would keep, too.
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
from model import GRID, VISION, Row, build, inputs, pixels, save_processor
from pictures import KINDS, SKILLS, Picture, descriptions, training_stream
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, get_cosine_schedule_with_warmup

WORKDIR = Path(tempfile.gettempdir()) / "expert-merging-benchmarks" / "vision"
MIXTURE, ADAPTER = "mixture", "-lora"
BATCH, SEED = 32, 0
# Optimiser steps and learning rate by kind of model; those of the tower come before those of the base.
TOWER, BASE, EXPERT, LORA, MIXED = (300, 1e-3), (550, 1e-3), (200, 3e-4), (150, 2e-3), (300, 3e-4)
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj|.*multi_modal_projector\.linear_\d"


def fit(name: str, parameters: Any, losses: Iterator[Any], steps: int, rate: float) -> None:
    """Take `steps` steps of AdamW on losses, with warm-up and cosine decay."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
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


def tower_losses(model: Any, head: Any) -> Iterator[Any]:
    """Yield the losses of naming what each cell holds from the tower's four patches of the cell."""
    stream = descriptions()
    while True:
        batch = [picture for picture, _, _ in islice(stream, BATCH)]
        with autocast():
            found_BPH = model.model.vision_tower(pixels([p.image for p in batch])).last_hidden_state[:, 1:]
            # Rows, two patches a cell, columns, two patches a cell: one vector of four patches for each cell.
            grid = found_BPH.view(len(batch), GRID, 2, GRID, 2, -1).transpose(2, 3).flatten(3).flatten(1, 2)
            logits_BCK = head(grid).float()
        yield cross_entropy(logits_BCK.flatten(0, 1), torch.tensor([p.cells for p in batch]).flatten())


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
    head = torch.nn.Linear(4 * VISION["hidden_size"], len(KINDS))
    tower = model.model.vision_tower
    fit("tower", [*tower.parameters(), *head.parameters()], tower_losses(model, head), *TOWER)
    rows = ((picture.image, question, answer) for picture, question, answer in descriptions())
    fit("base", model.parameters(), answer_losses(model, rows), *BASE)
    return model


def make_expert(name: str, base: Path) -> Any:
    """Train an expert, its LoRA version or the mixture from the base, with the base's vision tower."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
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
