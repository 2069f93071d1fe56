"""PCB-Merging: elements of task vectors weighted by how they compete within their expert and between the experts.

Source: Du et al., Parameter Competition Balancing for Model Merging, arXiv 2410.02396, and its published code, whose
script for vision models clamps 1 % instead of `clamp`.
Formula: over all elements of a model, uₖ = |τₖ| clamped to its `clamp` and 1 − `clamp` quantiles, τ̂ₖ = sign(τₖ)·uₖ,
n(x) = (x − min x)/(max x − min x), βₖ = exp(K·n(uₖ)²)·tanh(τₖ·Σⱼ τⱼ), qₖ the 1 − `ratio` quantile of βₖ,
sₖ = n(max(βₖ, qₖ)), and per element θ = θ₀ + λ·Σₖ sₖ·τ̂ₖ / max(Σₖ sₖ, 1e-12). A quantile is the element at its place in
sorted order. Where an expert's uₖ, or βₖ from qₖ on, are all equal, n is 0.
Options: `ratio` (0.1), `clamp` (1e-4), `lambda` (1.2).

Quantiles and extremes are those of the whole model, found exactly by counting. Each expert is read five times: twice
for uₖ, twice for βₖ, and for the sum. Memory does not grow with their number, but for tables of counts, 1 MB an expert.
Letters: N elements of a piece, B of a block, K experts.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.methods.options import Method, Option
from engine.methods.prepass import Group, selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from engine.methods.arithmetic.selection import Counts
    from engine.methods.arithmetic.tensor import Block, MergeTensor
    from engine.task_vectors.pieces import Piece
    from engine.task_vectors.pipeline import Fill

RATIO = Option(
    "ratio", 0.1, "fraction of each task vector's elements that may count, those with the largest β", low=0, high=1
)
CLAMP = Option(
    "clamp", 1e-4, "fraction of the smallest, and of the largest, absolute values that are clamped", low=0, high=0.5
)
LAMBDA = Option("lambda", 1.2, "λ, the factor of the merged task vector")

METHOD = Method(
    "pcb",
    "task vectors weighted per element by competition within and between the experts (PCB-Merging)",
    "Du et al., PCB-Merging, arXiv 2410.02396",
    "θ = θ₀ + λ·Σₖ sₖ·τ̂ₖ / Σₖ sₖ, s from exp(K·n(|τₖ|)²)·tanh(τₖ·Σⱼ τⱼ)",
    (RATIO, CLAMP, LAMBDA),
)

LEAST_SUM = 1e-12
# β is counted by the upper and the lower half of its 32 bits.
SCORE_BINS = 1 << 16


def _count_sizes(tensor: MergeTensor, high: Counts | None) -> Counts:
    """Return the counts of |τₖ|, [2K, bins]: for the lower quantile of each expert, then for the upper one."""
    from engine.methods.arithmetic.sparse import counts

    if high is None:
        return np.tile(counts(tensor, None), (2, 1))
    experts = len(high) // 2
    return np.concatenate([counts(tensor, part) for part in (high[:experts], high[experts:])])


def _keep_sizes(counts: Counts, group: Group) -> list[int]:
    numel, clamp = group.numel, group.mean("clamp")
    lower, upper = int(numel * clamp), max(0, int(numel * (1 - clamp) - 1))
    return [numel - lower] * group.experts + [numel - upper] * group.experts


def _count_scores(tensor: MergeTensor, high: Counts | None) -> Counts:
    """Return the counts of βₖ, [2K, SCORE_BINS]: for the quantile of each expert, then for the maximum."""
    experts = len(tensor.task_vectors)
    total, lock = np.zeros((2 * experts, SCORE_BINS), dtype=np.int64), Lock()

    def add(row: int, part_B: npt.NDArray[np.uint32]) -> None:
        counted = np.bincount(part_B, minlength=SCORE_BINS)
        with lock:  # whole numbers: the order of the pieces does not matter
            total[row] += counted

    def in_piece(piece: Piece) -> None:
        for _, _, _, tau_KB in _blocks(tensor, piece):
            for k, (_, score_B) in enumerate(_scores(tensor, tau_KB)):
                key_B = _ordered(score_B)
                upper_B, lower_B = key_B >> np.uint32(16), key_B & np.uint32(SCORE_BINS - 1)
                if high is None:
                    add(k, upper_B)
                else:
                    for row in (k, experts + k):
                        add(row, lower_B[upper_B == high[row]])

    for _ in tensor.each(in_piece):
        pass
    if high is None:
        total[experts:] = total[:experts]
    return total


def _keep_scores(counts: Counts, group: Group) -> list[int]:
    place = min(int(group.numel * (1 - group.mean("ratio"))), group.numel - 1)
    return [group.numel - place] * group.experts + [1] * group.experts


PREPASSES = (
    *selection("quantiles of sizes", _count_sizes, _keep_sizes),
    *selection("quantiles of scores", _count_scores, _keep_scores),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one merging pass.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element.
    """
    import torch

    lowest, highest = _bounds(tensor, "quantiles of scores", ordered=True)
    factor = np.float32(tensor.values["lambda"])

    def fill(piece: Piece, out_N: Tensor) -> None:
        for start, stop, base_B, tau_KB in _blocks(tensor, piece):
            sum_B, divisor_B = np.zeros((2, stop - start), dtype=np.float32)
            for k, (clamped_B, score_B) in enumerate(_scores(tensor, tau_KB)):
                share_B = _normalized(score_B, lowest[k], highest[k])
                sum_B += share_B * np.copysign(clamped_B, tau_KB[k]) * (tau_KB[k] != 0)
                divisor_B += share_B
            merged_B = sum_B / np.maximum(divisor_B, np.float32(LEAST_SUM))
            out_N[start - piece.start : stop - piece.start].copy_(torch.from_numpy(base_B.numpy() + factor * merged_B))

    return fill


def _blocks(tensor: MergeTensor, piece: Piece) -> Iterator[tuple[int, int, Tensor, Block]]:
    """Yield the blocks of a piece, checked: no NaN is compared or counted."""
    import torch

    for start, stop, base_B, tau_KB in tensor.blocks(piece, range(len(tensor.task_vectors))):
        for k, tau_B in enumerate(tau_KB):
            tensor.check_finite(k, torch.from_numpy(tau_B))
        yield start, stop, base_B, tau_KB


def _scores(tensor: MergeTensor, tau_KB: Block) -> Iterator[tuple[Block, Block]]:
    """Yield uₖ and exp(−K)·βₖ of each expert, [B], one after the other: memory does not grow with their number.

    The factor, which n(βₖ) does not depend on, keeps it finite for many experts.
    """
    lower, upper = _bounds(tensor, "quantiles of sizes")
    experts = len(tau_KB)
    with np.errstate(over="ignore", under="ignore"):
        sum_B = tau_KB.sum(axis=0)
        for k, tau_B in enumerate(tau_KB):
            clamped_B = np.clip(np.abs(tau_B), lower[k], upper[k])
            share_B = _normalized(clamped_B, lower[k], upper[k])
            inter_B = np.tanh(tau_B * sum_B)
            yield clamped_B, np.exp(np.float32(experts) * (share_B * share_B - 1)) * inter_B


def _normalized(value_B: Block, low: np.float32, high: np.float32) -> Block:
    """Return n(max(x, low)), zero where low and high are equal."""
    if not high > low:
        return np.zeros_like(value_B)
    return (np.maximum(value_B, low) - low) / (high - low)


def _bounds(tensor: MergeTensor, name: str, ordered: bool = False) -> tuple[Block, Block]:
    """Return the lower and the upper values that a prepass has found of the experts, [K] each."""
    bits = np.array([threshold.bits for threshold in tensor.known[name]], dtype=np.uint32)
    values = _value(bits) if ordered else bits.view(np.float32)
    return values[: len(values) // 2], values[len(values) // 2 :]


def _ordered(value_B: Block) -> npt.NDArray[np.uint32]:
    """Return whole numbers in the order of float32 numbers, negative ones included; zeros of both signs are equal."""
    bits_B = (value_B + np.float32(0)).view(np.uint32)
    negative_B = bits_B >> np.uint32(31)
    # All bits of negative numbers are flipped, the sign of the others.
    mask_B: Any = (np.uint32(0) - negative_B) | np.uint32(1 << 31)
    return bits_B ^ mask_B  # type: ignore[no-any-return]


def _value(ordered_K: npt.NDArray[np.uint32]) -> Block:
    """Return the float32 numbers that `_ordered` maps to these whole numbers."""
    positive_K = ordered_K >> np.uint32(31)
    mask_K: Any = (positive_K - np.uint32(1)) | np.uint32(1 << 31)
    return (ordered_K ^ mask_K).view(np.float32)  # type: ignore[no-any-return]
