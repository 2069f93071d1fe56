"""Compute exact match and loss of a model on a skill with one forward pass per example.

Greedy decoding produces exactly the answer if and only if, given the answer as input, the most likely token is right at
every position of it, its end included. One forward pass therefore gives both figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import skills
import torch
from transformers import DynamicCache

BATCH = 50


@dataclass(frozen=True)
class Score:
    """`exact_match` in per cent of the examples; `loss` of the answers in nats per token."""

    exact_match: float
    loss: float


def score(model, tokenizer, skill: str, split: str = "test", examples: int | None = None) -> Score:
    """Score a model on the first examples of one split of a skill; None: on all of them."""
    records = skills.read(skill, split)[:examples]
    return score_rows(model, [skills.encode(tokenizer, record["question"], record["response"]) for record in records])


@torch.inference_mode()
def score_rows(model, rows: list[tuple[list[int], int]]) -> Score:
    """Score a model on rows of (token ids of a chat, start of the answer); all chats must share a prefix."""
    # All chats start with the same tokens (the system prompt), whose keys and values are computed once. Chats of
    # similar length share a batch, which keeps padding small.
    rows = sorted(rows, key=lambda row: len(row[0]))
    first = rows[0][0]
    shared = next(i for i in range(len(first)) if len({row[i] for row, _ in rows}) > 1)
    prefix = model.model(torch.tensor([first[:shared]]), use_cache=True).past_key_values
    right = tokens = 0
    loss = 0.0
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        width = len(batch[-1][0])
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        layers = [
            (layer.keys.expand(len(batch), -1, -1, -1), layer.values.expand(len(batch), -1, -1, -1))
            for layer in prefix.layers
        ]
        hidden_BTH = model.model(
            ids_BT[:, shared:], attention_mask=mask_BT, past_key_values=DynamicCache(layers), use_cache=True
        ).last_hidden_state
        # The head reads all of its weights for every call: one call for the answers of the batch, N tokens together.
        before_NH = torch.cat(
            [hidden_BTH[b, start - 1 - shared : len(row) - 1 - shared] for b, (row, start) in enumerate(batch)]
        )
        answer_N = torch.tensor([token for row, start in batch for token in row[start:]])
        log_probs_NV = model.lm_head(before_NH).float().log_softmax(-1)
        loss -= log_probs_NV.gather(-1, answer_N[:, None]).sum().item()
        hits = (log_probs_NV.argmax(-1) == answer_N).split([len(row) - start for row, start in batch])
        right += sum(bool(hit.all()) for hit in hits)
        tokens += len(answer_N)
    return Score(100 * right / len(rows), loss / tokens)
