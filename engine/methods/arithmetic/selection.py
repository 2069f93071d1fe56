"""Exact selection of the k-th largest absolute value of many elements, by two rounds of counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.methods.arithmetic.kernels import LOW_BITS

Counts = npt.NDArray[np.int64]
# Thresholds below and above the bits of every magnitude: keep all elements, keep none.
ALL, NONE = -1, 0x7FFFFFFF


@dataclass(frozen=True)
class Threshold:
    """The threshold of one expert, as the bits of a float32 magnitude.

    Elements above `bits` are kept, and `equal` of the `found` elements that are equal to it.
    """

    bits: int
    equal: int
    found: int


class Found(NamedTuple):
    """What the first round of counting finds of each expert.

    Attributes:
        high: The upper bits of its threshold, [K].
        left: How many of the elements with these upper bits are kept.
        keep: How many of all elements are kept (None: all).
    """

    high: Counts
    left: list[int]
    keep: Sequence[int | None]


def select(count: Callable[[Counts | None], Counts], keep: Sequence[int | None]) -> list[Threshold]:
    """Return the threshold of each expert at which its `keep[k]` largest elements are kept (None: all).

    Args:
        count: `count(None)` returns the number of elements per value of the upper bits, [K, HIGH_BINS]. `count(high)`
            with `high` [K] returns the number per value of the lower bits among those with the upper bits `high[k]`,
            [K, LOW_BINS].
        keep: Number of elements to keep, per expert.
    """
    found = upper_bits(count(None), keep)
    return thresholds(count(found.high), found)


def upper_bits(counts: Counts, keep: Sequence[int | None]) -> Found:
    """Return what counts by upper bits [K, HIGH_BINS] show of the thresholds; see `select`."""
    highs, left = zip(*(_rank(row, kept) for row, kept in zip(counts, keep, strict=True)), strict=True)
    return Found(np.array(highs, dtype=np.int64), list(left), list(keep))


def thresholds(counts: Counts, found: Found) -> list[Threshold]:
    """Return the thresholds, from counts by lower bits [K, LOW_BINS]; see `select`."""
    chosen = []
    for row, high, left, kept in zip(counts, found.high.tolist(), found.left, found.keep, strict=True):
        if kept is None:
            chosen.append(Threshold(ALL, 0, 0))
        elif kept == 0:
            chosen.append(Threshold(NONE, 0, 0))
        else:
            low, equal = _rank(row, left)
            chosen.append(Threshold(high << LOW_BITS | low, equal, int(row[low])))
    return chosen


def _rank(counts: npt.NDArray[np.int64], kept: int | None) -> tuple[int, int]:
    """Return the bin that contains the `kept`-th largest element, and how many elements of that bin are kept."""
    if not kept:
        return 0, 0
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, kept))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, kept - above
