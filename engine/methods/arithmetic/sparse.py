"""Sparse task vectors, block by block: trimmed by magnitude or thinned at random. Implementations of `Sparse`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from engine.methods.arithmetic.kernels import HIGH_BINS, LOW_BINS, count_equal, count_high, count_low, thin, trim
from engine.methods.arithmetic.selection import ALL, Counts, Threshold, select
from engine.methods.arithmetic.tensor import Block, MergeTensor
from engine.task_vectors.pieces import Piece

# Experts counted in one pass. Each has its own table of counts, and all of them should fit a core's cache.
EXPERTS_PER_PASS = 8


class Dense:
    """All elements are kept."""

    def state(self, piece: Piece) -> npt.NDArray[np.int64]:
        """See `Sparse`."""
        return np.zeros(0, dtype=np.int64)

    def apply(self, k: int, start: int, tau_B: Block, state: npt.NDArray[np.int64]) -> None:
        """See `Sparse`."""


class Trimmed:
    """The elements with the largest absolute values are kept; of equal ones, the first in the tensor."""

    def __init__(self, thresholds: Sequence[Threshold], allowed: Mapping[int, Sequence[int]]) -> None:
        # `allowed`: first element of a piece → for each expert, how many elements equal to the threshold it may keep.
        self._thresholds, self._allowed = thresholds, allowed

    @classmethod
    def everywhere(cls, thresholds: Sequence[Threshold]) -> Trimmed:
        """Trim by thresholds of the whole model. All elements equal to one are kept, as tensors have no order."""
        return cls(thresholds, {})

    @classmethod
    def within(cls, tensor: MergeTensor, densities: Sequence[float]) -> Trimmed:
        """Trim by the tensor's own thresholds: each expert keeps max(1, ⌊density·n⌋) of n elements."""
        keep = [kept_of(density, tensor.numel) for density in densities]
        thresholds = select(lambda high: counts(tensor, high), keep)
        ties = [k for k, threshold in enumerate(thresholds) if threshold.bits > 0 and threshold.equal < threshold.found]
        if not ties:
            return cls(thresholds, {})

        # More elements are equal to a threshold than may be kept; counting them shows how many each piece may keep.
        def equal(piece: Piece) -> tuple[int, list[int]]:
            counted = [0] * len(thresholds)
            for _, _, _, tau_KB in tensor.blocks(piece, ties):
                for row, k in enumerate(ties):
                    counted[k] += int(count_equal(tau_KB[row].view(np.uint32), thresholds[k].bits))
            return piece.start, counted

        starts, in_piece = zip(*tensor.each(equal), strict=True)
        before = accumulate(in_piece, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], initial=[0] * len(keep))
        allowed = {
            start: [max(0, threshold.equal - used) for threshold, used in zip(thresholds, sums, strict=True)]
            for start, sums in zip(starts, before, strict=False)
        }
        return cls(thresholds, allowed)

    def state(self, piece: Piece) -> npt.NDArray[np.int64]:
        """See `Sparse`: how many elements equal to the threshold may still be kept, [K]."""
        unlimited = [piece.numel] * len(self._thresholds)
        return np.array(self._allowed.get(piece.start, unlimited), dtype=np.int64)

    def apply(self, k: int, start: int, tau_B: Block, state: npt.NDArray[np.int64]) -> None:
        """See `Sparse`."""
        if self._thresholds[k].bits != ALL:
            state[k] = trim(tau_B, tau_B.view(np.uint32), self._thresholds[k].bits, state[k])


class Thinned:
    """Elements are kept with probability `densities[k]`, by a hash of `seeds[k]` and the element's index."""

    def __init__(self, seeds: Sequence[int], densities: Sequence[float]) -> None:
        self._seeds = [np.uint64(seed) for seed in seeds]
        self._below = [np.uint64(round(density * 2**32)) for density in densities]

    def state(self, piece: Piece) -> npt.NDArray[np.int64]:
        """See `Sparse`."""
        return np.zeros(0, dtype=np.int64)

    def apply(self, k: int, start: int, tau_B: Block, state: npt.NDArray[np.int64]) -> None:
        """See `Sparse`."""
        if self._below[k] < 2**32:
            thin(tau_B, self._seeds[k], start, self._below[k])


def kept_of(density: float, numel: int) -> int | None:
    """Return how many of n elements are kept: max(1, ⌊density·n⌋), 0 at density 0, None (all) at density 1."""
    if density >= 1:
        return None
    return max(1, math.floor(density * numel)) if density > 0 else 0


def no_counts(experts: int, high: Counts | None) -> Counts:
    """Return the counts of no elements; see `counts`."""
    return np.zeros((experts, HIGH_BINS if high is None else LOW_BINS), dtype=np.int64)


def counts(tensor: MergeTensor, high: Counts | None) -> Counts:
    """Return the number of elements of each τₖ of a tensor by their upper or lower bits; see `select`."""
    experts = list(range(len(tensor.task_vectors)))
    total = no_counts(len(experts), high)
    for first in range(0, len(experts), EXPERTS_PER_PASS):
        members = experts[first : first + EXPERTS_PER_PASS]

        def in_piece(piece: Piece, members: Sequence[int] = members) -> Counts:
            part = np.zeros((len(members), total.shape[1]), dtype=np.int64)
            for _, _, _, tau_KB in tensor.blocks(piece, members):
                for row, k in enumerate(members):
                    bits_B = tau_KB[row].view(np.uint32)
                    if high is None:
                        count_high(bits_B, part[row])
                    else:
                        count_low(bits_B, high[k], part[row])
            return part

        for part in tensor.each(in_piece):
            total[members] += part
    return total
