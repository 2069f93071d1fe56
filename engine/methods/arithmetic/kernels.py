"""What sparse methods do to every element, compiled: count, trim, thin, elect. Knows arrays alone.

Absolute values are compared by their bits, which for floats that are not negative is the order of the numbers: exact,
and no sum of anything. Arrays are float32 of a block [B] or of all experts' [K, B] unless said.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# Counting goes over the upper bits first, without the sign, and then over the lower ones.
LOW_BITS = 16


HIGH_BINS, LOW_BINS = 1 << 15, 1 << LOW_BITS


MAGNITUDE = 0x7FFFFFFF


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def count_high(bits_B: Any, counts: Any) -> None:
    """Add one to `counts` [HIGH_BINS] for each element, at the upper bits of its absolute value; `bits_B` uint32."""
    for i in range(bits_B.shape[0]):
        counts[(bits_B[i] & np.uint32(MAGNITUDE)) >> np.uint32(LOW_BITS)] += 1


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def count_low(bits_B: Any, high: Any, counts: Any) -> None:
    """The same at the lower bits [LOW_BINS], of the elements whose upper bits are `high`."""
    wanted = np.uint32(high)
    for i in range(bits_B.shape[0]):
        magnitude = bits_B[i] & np.uint32(MAGNITUDE)
        if magnitude >> np.uint32(LOW_BITS) == wanted:
            counts[magnitude & np.uint32(LOW_BINS - 1)] += 1


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def count_equal(bits_B: Any, threshold: int) -> Any:
    """How many elements have the absolute value whose bits are `threshold`."""
    found = 0
    for i in range(bits_B.shape[0]):
        found += np.int64(bits_B[i] & np.uint32(MAGNITUDE)) == threshold
    return found


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def trim(tau_B: Any, bits_B: Any, threshold: int, allowed: int) -> Any:
    """Zero what is below `threshold`, and what is equal to it after the first `allowed`; how many are still allowed.

    `bits_B` is the memory of `tau_B` as uint32.
    """
    for i in range(tau_B.shape[0]):
        magnitude = np.int64(bits_B[i] & np.uint32(MAGNITUDE))
        if magnitude <= threshold:
            if magnitude == threshold and allowed > 0:
                allowed -= 1
            else:
                tau_B[i] = 0
    return allowed


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def thin(tau_B: Any, seed: Any, first: int, below: Any) -> None:
    """Zero the elements whose hash is not below `below` of 2³²; `first` is the place of the block in its tensor.

    The hash is splitmix64's: one multiplication chain a number, and no state.
    """
    for i in range(tau_B.shape[0]):
        z = np.uint64(seed) + np.uint64(first + i + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        if (z >> np.uint64(32)) >= np.uint64(below):
            tau_B[i] = 0


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def absolute_sum(tau_B: Any) -> Any:
    """Σ |τ| in float64."""
    total = 0.0
    for i in range(tau_B.shape[0]):
        total += abs(np.float64(tau_B[i]))
    return total


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def add(sum_B: Any, tau_B: Any, factor: Any) -> None:
    """sum += factor·τ."""
    for i in range(sum_B.shape[0]):
        sum_B[i] += factor * tau_B[i]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def agree(sum_B: Any, divisor_B: Any, sign_B: Any, tau_B: Any, factor: Any, weight: Any) -> None:
    """sum += factor·τ and divisor += weight where factor·τ has the sign of `sign_B`, + where that is zero."""
    for i in range(sum_B.shape[0]):
        value = factor * tau_B[i]
        agrees = value > 0 if sign_B[i] >= 0 else value < 0
        sum_B[i] += value if agrees else np.float32(0)
        divisor_B[i] += weight if agrees else np.float32(0)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def finish(base_B: Any, sum_B: Any, divisor_B: Any, factor: Any) -> None:
    """sum = base + factor·sum/divisor, undivided where the divisor is zero."""
    for i in range(sum_B.shape[0]):
        divisor = divisor_B[i] if divisor_B[i] != 0 else np.float32(1)
        sum_B[i] = base_B[i] + factor * (sum_B[i] / divisor)
