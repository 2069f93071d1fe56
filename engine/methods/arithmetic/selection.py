"""The k-th largest absolute value of very many, exactly, from two rounds of counting. Knows no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.methods.arithmetic.kernels import LOW_BITS

Counts = npt.NDArray[np.int64]


# Bits below and above those of every number: keep all, keep none.
ALL, NONE = -1, 0x7FFFFFFF


@dataclass(frozen=True)
class Threshold:
    """Kept are elements whose absolute value has bits above `bits`, and `equal` of the `found` that have these bits."""

    bits: int
    equal: int
    found: int


def select(count: Callable[[Counts | None], Counts], keep: Sequence[int | None]) -> list[Threshold]:
    """The threshold of each expert, of whose elements `keep` are to stay (None: all of them).

    `count(None)` gives how many elements have each upper half of bits, [K, bins], and `count(high)` how many of those
    whose upper half is `high[k]` have each lower half.
    """
    highs, left = zip(*(_rank(row, kept) for row, kept in zip(count(None), keep, strict=True)), strict=True)
    lows = count(np.array(highs, dtype=np.int64))
    found = []
    for k, kept in enumerate(keep):
        if kept is None:
            found.append(Threshold(ALL, 0, 0))
        elif kept == 0:
            found.append(Threshold(NONE, 0, 0))
        else:
            low, equal = _rank(lows[k], left[k])
            found.append(Threshold(highs[k] << LOW_BITS | low, equal, int(lows[k][low])))
    return found


def _rank(counts: npt.NDArray[np.int64], kept: int | None) -> tuple[int, int]:
    """The bin in which the `kept`-th from above is, and how many of that bin are still to be kept."""
    if not kept:
        return 0, 0
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, kept))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, kept - above
