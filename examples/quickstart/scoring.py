"""Compute exact match and loss of a model on a skill with one forward pass per example.

Greedy decoding produces exactly the answer if and only if, given the answer as input, the most likely token is right at
every position of it, its end included. One forward pass therefore gives both figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import skills
import torch
from train_experts import encode
from transformers import DynamicCache

BATCH = 50


@dataclass(frozen=True)
class Score:
    """`exact_match` in per cent of the examples; `loss` of the answers in nats per token."""

    exact_match: float
    loss: float


def score(model, tokenizer, skill: str, split: str = "test") -> Score:
    """Score a model on one split of a skill."""
    records = skills.read(skill, split)
    return score_rows(model, [encode(tokenizer, record["question"], record["response"]) for record in records])


@torch.inference_mode()
def score_rows(model, rows: list[tuple[list[int], int]]) -> Score:
    """Score a model on rows of (token ids of a chat, start of the answer); all chats must share a prefix."""
    ids = [row for row, _ in rows]
    # All chats start with the same tokens (the system prompt), whose keys and values are computed once.
    shared = next(i for i in range(len(ids[0])) if len({row[i] for row in ids}) > 1)
    prefix = model.model(torch.tensor([ids[0][:shared]]), use_cache=True).past_key_values
    right = tokens = 0
    loss = 0.0
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        width = max(len(row) for row, _ in batch)
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        layers = [
            (layer.keys.expand(len(batch), -1, -1, -1), layer.values.expand(len(batch), -1, -1, -1))
            for layer in prefix.layers
        ]
        hidden_BTH = model.model(
            ids_BT[:, shared:], attention_mask=mask_BT, past_key_values=DynamicCache(layers), use_cache=True
        ).last_hidden_state
        for (row, start), hidden_TH in zip(batch, hidden_BTH, strict=True):
            answer = torch.tensor(row[start:])
            log_probs = model.lm_head(hidden_TH[start - 1 - shared : len(row) - 1 - shared]).float().log_softmax(-1)
            right += bool((log_probs.argmax(-1) == answer).all())
            loss -= log_probs.gather(-1, answer[:, None]).sum().item()
            tokens += len(answer)
    return Score(100 * right / len(rows), loss / tokens)
