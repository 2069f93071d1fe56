"""The order of the calibration samples, and their division into windows and forward passes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from engine.config.schema import Config

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


def pass_limit(config: Config, on_gpu: bool, seats: int = 1, tokens: Sequence[Sequence[int]] = ()) -> int:
    """Return the tokens of a pass at most.

    With `batch_tokens: auto`, on GPUs, a window has a pass for each trainer, if trainers may share it.

    Args:
        config: The config.
        on_gpu: Whether trainers compute on GPUs.
        seats: The number of trainers for which there are GPUs.
        tokens: The tokens of the samples of each expert.
    """
    if config.batch_tokens != "auto":
        return config.batch_tokens
    if not on_gpu:
        return CPU_TOKENS
    window, asked = config.parameters.gradient_accumulation, config.cluster.trainers
    # With a sum of dense weight gradients, a pass moves as much as a step does, and one trainer is faster.
    if config.gradients == "accumulate" or config.parameters.task_vectors == "whole":
        asked = 1
    trainers = min(window, seats if asked == "auto" else min(seats, asked))
    counts = [count for of_expert in tokens for count in of_expert]
    if trainers < 2 or not counts:
        return GPU_TOKENS
    return min(GPU_TOKENS, math.ceil(window / trainers) * math.ceil(sum(counts) / len(counts)))


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
