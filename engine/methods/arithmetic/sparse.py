"""Task vectors with most of their elements set to zero, block by block: trimmed by size, or thinned at random."""

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

# Experts that are counted side by side: each has a table of its own, and all of them should fit a core's cache.
EXPERTS_PER_PASS = 8


class Dense:
    """All of them stay."""

    def state(self, piece: Piece) -> npt.NDArray[np.int64]:
        """See `Sparse`."""
        return np.zeros(0, dtype=np.int64)

    def apply(self, k: int, start: int, tau_B: Block, state: npt.NDArray[np.int64]) -> None:
        """See `Sparse`."""


class Trimmed:
    """The largest by absolute value stay, of equal ones the first in the tensor."""

    def __init__(self, thresholds: Sequence[Threshold], allowed: Mapping[int, Sequence[int]]) -> None:
        # `allowed`: by the first element of a piece, how many that are equal to the threshold it may keep.
        self._thresholds, self._allowed = thresholds, allowed

    @classmethod
    def everywhere(cls, thresholds: Sequence[Threshold]) -> Trimmed:
        """By thresholds of the whole model: all that are equal to one stay, as no order runs over tensors."""
        return cls(thresholds, {})

    @classmethod
    def within(cls, tensor: MergeTensor, densities: Sequence[float]) -> Trimmed:
        """By the tensor's own thresholds, max(1, ⌊density·n⌋) of n elements an expert."""
        keep = [kept_of(density, tensor.numel) for density in densities]
        thresholds = select(lambda high: counts(tensor, high), keep)
        doubtful = [k for k, one in enumerate(thresholds) if one.bits > 0 and one.equal < one.found]
        if not doubtful:
            return cls(thresholds, {})

        # More are equal to a threshold than may stay: which piece may keep how many is known when all are counted.
        def equal(piece: Piece) -> tuple[int, list[int]]:
            found = [0] * len(thresholds)
            for _, _, _, tau_KB in tensor.blocks(piece, doubtful):
                for row, k in enumerate(doubtful):
                    found[k] += int(count_equal(tau_KB[row].view(np.uint32), thresholds[k].bits))
            return piece.start, found

        starts, found = zip(*tensor.each(equal), strict=True)
        before = accumulate(found, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], initial=[0] * len(keep))
        allowed = {
            start: [max(0, one.equal - used) for one, used in zip(thresholds, sums, strict=True)]
            for start, sums in zip(starts, before, strict=False)
        }
        return cls(thresholds, allowed)

    def state(self, piece: Piece) -> npt.NDArray[np.int64]:
        """See `Sparse`: how many equal elements may still stay, [K]."""
        everything = [piece.numel] * len(self._thresholds)
        return np.array(self._allowed.get(piece.start, everything), dtype=np.int64)

    def apply(self, k: int, start: int, tau_B: Block, state: npt.NDArray[np.int64]) -> None:
        """See `Sparse`."""
        if self._thresholds[k].bits != ALL:
            state[k] = trim(tau_B, tau_B.view(np.uint32), self._thresholds[k].bits, state[k])


class Thinned:
    """Each stays with the probability `densities[k]`, by a hash of `seeds[k]` and its place in the tensor."""

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
    """How many of so many elements stay: max(1, ⌊density·n⌋), none at density 0, and None for all."""
    if density >= 1:
        return None
    return max(1, math.floor(density * numel)) if density > 0 else 0


def counts(tensor: MergeTensor, high: Counts | None) -> Counts:
    """How many elements of each τₖ of a tensor have each half of bits; see `select`."""
    experts = list(range(len(tensor.task_vectors)))
    total = np.zeros((len(experts), HIGH_BINS if high is None else LOW_BINS), dtype=np.int64)
    for first in range(0, len(experts), EXPERTS_PER_PASS):
        some = experts[first : first + EXPERTS_PER_PASS]

        def one(piece: Piece, some: Sequence[int] = some) -> Counts:
            part = np.zeros((len(some), total.shape[1]), dtype=np.int64)
            for _, _, _, tau_KB in tensor.blocks(piece, some):
                for row, k in enumerate(some):
                    bits_B = tau_KB[row].view(np.uint32)
                    if high is None:
                        count_high(bits_B, part[row])
                    else:
                        count_low(bits_B, high[k], part[row])
            return part

        for part in tensor.each(one):
            total[some] += part
    return total
