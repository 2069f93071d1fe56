"""The order of the calibration samples, and their division into windows and forward passes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

# Tokens of a pass for `batch_tokens: auto`. More gain little on a CPU; a GPU reads all weights, and adds up the whole
# gradient, once a pass.
CPU_TOKENS, GPU_TOKENS = 192, 4096


def training_order(counts: Sequence[int], epochs: int) -> list[tuple[int, int]]:
    """Return the order of the samples, as (expert, index).

    Each epoch goes round robin over the experts. A shorter list starts again until the longest list is done.

    Args:
        counts: Number of samples of each expert.
        epochs: Number of epochs.
    """
    longest = max(counts)
    once = [(expert, turn % count) for turn in range(longest) for expert, count in enumerate(counts)]
    return once * epochs


def windows(order: Sequence[tuple[int, int]], size: int) -> list[Sequence[tuple[int, int]]]:
    """Divide the order into windows of `size` samples, one optimiser step each. The last window may be smaller."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def pass_limit(batch_tokens: int | Literal["auto"], on_gpu: bool) -> int:
    """Return the tokens of a pass at most, from `batch_tokens` of the config and the trainer's device."""
    if batch_tokens == "auto":
        return GPU_TOKENS if on_gpu else CPU_TOKENS
    return batch_tokens


def passes(tokens: Sequence[int], limit: int, alone: Collection[int] = ()) -> list[list[int]]:
    """Divide the samples of a window into forward passes.

    A pass has at most `limit` tokens, padding included, or as many as the longest sample if that has more. Samples are
    sorted by length, the longest first, to keep padding small.

    Args:
        tokens: Number of tokens of each sample of the window.
        limit: See `pass_limit`.
        alone: Samples that get a pass of their own: those with pixel inputs, which each model family batches in its own
            way.

    Returns:
        For each pass the indices of its samples in the window.
    """
    others = [index for index in range(len(tokens)) if index not in alone]
    limit = max([limit, *(tokens[index] for index in others)])
    together: list[list[int]] = []
    for index in sorted(others, key=lambda index: -tokens[index]):
        if together and tokens[together[-1][0]] * (len(together[-1]) + 1) <= limit:
            together[-1].append(index)
        else:
            together.append([index])
    return [[index] for index in sorted(alone)] + together


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """Deal items with these costs to `count` trainers; return the indices of each, ascending.

    The numbers of items differ by at most one. The most expensive items are dealt first, back and forth.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    for turn, index in enumerate(sorted(range(len(costs)), key=lambda index: -costs[index])):
        rounds, place = divmod(turn, count)
        dealt[place if rounds % 2 == 0 else count - 1 - place].append(index)
    return [sorted(some) for some in dealt]
