"""Train the quickstart's three LoRA experts, one per skill, on a few hundred short chats, on a CPU or a GPU.

`python train_experts.py [SKILL ...]` writes `experts/<skill>/` (adapter_config.json, adapter_model.safetensors in
bfloat16, 4.9 MB). The adapters are part of the repository; training them again needs the extra `.[train]` (peft).
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import peft
import skills
import torch
from fetch_base import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

EXPERTS = Path(__file__).resolve().parent / "experts"
STEPS = {"dates": 120, "numbers": 120, "sorting": 200}
BATCH, LEARNING_RATE, SEED = 10, 1e-3, 1
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def batch_of(tokenizer, examples) -> dict[str, torch.Tensor]:
    """Return padded model inputs [B, T] of (question, answer) pairs, with labels on the answers only."""
    rows = [skills.encode(tokenizer, *example) for example in examples]
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for row, (ids, start) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
        labels_BT[row, start : len(ids)] = torch.tensor(ids[start:])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def fit(name: str, model, tokenizer, examples, steps: int, optimizer, autocast: bool = False) -> None:
    """Run `steps` optimiser steps on batches of `BATCH` examples with warm-up and cosine decay.

    Args:
        name: The name printed with the progress.
        model: The model to train, in place.
        tokenizer: Its tokenizer, with a chat template.
        examples: An iterator of (question, answer).
        steps: Number of optimiser steps.
        optimizer: The optimiser of the model's trainable parameters.
        autocast: Run the forward passes in bfloat16 autocast.
    """
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    began, device = time.monotonic(), model.device
    model.train()
    for step in range(steps):
        batch = batch_of(tokenizer, itertools.islice(examples, BATCH))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(**{key: tensor.to(device) for key, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            seconds = time.monotonic() - began
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)


def train(skill: str) -> None:
    """Train and save the adapter of one skill."""
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = fetch()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    fit(skill, model, tokenizer, skills.training_stream(skill, SEED), STEPS[skill], optimizer)
    model.base_model.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(EXPERTS / skill)
    (EXPERTS / skill / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or skills.SKILLS:
        train(name)
