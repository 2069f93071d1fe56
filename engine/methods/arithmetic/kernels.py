"""Compiled kernels of weight-space methods: counting, trimming, thinning, sign election, inner products of a block.

Absolute values are compared by their bits: for non-negative floats the order of the bits is that of the numbers, so the
comparison is exact. Arrays are float32 [B], the elements of a block, unless a docstring says otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.compiled import compiled

# Magnitudes are counted by their upper 15 bits (without the sign) first, then by their lower 16 bits.
LOW_BITS = 16
HIGH_BINS, LOW_BINS = 1 << 15, 1 << LOW_BITS
# Mask of a float32's bits without the sign.
MAGNITUDE = 0x7FFFFFFF
# Partial sums of an inner product.
LANES = 8


@compiled
def count_high(bits_B: Any, counts: Any) -> None:
    """Count the elements of `bits_B`, uint32, by the upper bits of their magnitude in `counts` [HIGH_BINS], int64."""
    for i in range(bits_B.shape[0]):
        counts[(bits_B[i] & np.uint32(MAGNITUDE)) >> np.uint32(LOW_BITS)] += 1


@compiled
def count_low(bits_B: Any, high: Any, counts: Any) -> None:
    """Count the elements with the upper bits `high` by their lower bits in `counts` [LOW_BINS], int64."""
    upper = np.uint32(high)
    for i in range(bits_B.shape[0]):
        magnitude = bits_B[i] & np.uint32(MAGNITUDE)
        if magnitude >> np.uint32(LOW_BITS) == upper:
            counts[magnitude & np.uint32(LOW_BINS - 1)] += 1


@compiled
def count_equal(bits_B: Any, threshold: int) -> Any:
    """Return the number of elements whose magnitude has the bits `threshold`."""
    count = 0
    for i in range(bits_B.shape[0]):
        count += np.int64(bits_B[i] & np.uint32(MAGNITUDE)) == threshold
    return count


@compiled
def trim(tau_B: Any, bits_B: Any, threshold: int, allowed: int) -> Any:
    """Zero the elements below `threshold`, and those equal to it except the first `allowed`.

    `bits_B` is the memory of `tau_B` as uint32.

    Returns:
        How many equal elements are still allowed in the following blocks.
    """
    for i in range(tau_B.shape[0]):
        magnitude = np.int64(bits_B[i] & np.uint32(MAGNITUDE))
        if magnitude <= threshold:
            if magnitude == threshold and allowed > 0:
                allowed -= 1
            else:
                tau_B[i] = 0
    return allowed


@compiled
def thin(tau_B: Any, seed: Any, first: int, below: Any) -> None:
    """Keep each element with probability `below` / 2³² and zero the others; `first` is the index of element 0.

    An element is kept if a hash of the seed and its index in the tensor is less than `below`. The hash is splitmix64
    (Steele et al., Fast Splittable Pseudorandom Number Generators, 2014), which needs no state.
    """
    for i in range(tau_B.shape[0]):
        z = np.uint64(seed) + np.uint64(first + i + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        if (z >> np.uint64(32)) >= np.uint64(below):
            tau_B[i] = 0


@compiled
def absolute_sum(tau_B: Any) -> Any:
    """Return Σ |τ| in float64."""
    total = 0.0
    for i in range(tau_B.shape[0]):
        total += abs(np.float64(tau_B[i]))
    return total


@compiled
def add(sum_B: Any, tau_B: Any, factor: Any) -> None:
    """Add factor·τ to `sum_B`."""
    for i in range(sum_B.shape[0]):
        sum_B[i] += factor * tau_B[i]


@compiled
def agree(sum_B: Any, divisor_B: Any, sign_B: Any, tau_B: Any, factor: Any, weight: Any) -> None:
    """Add factor·τ to `sum_B` and weight to `divisor_B` where factor·τ has the sign of `sign_B` (+ if that is zero)."""
    for i in range(sum_B.shape[0]):
        value = factor * tau_B[i]
        agrees = value > 0 if sign_B[i] >= 0 else value < 0
        sum_B[i] += value if agrees else np.float32(0)
        divisor_B[i] += weight if agrees else np.float32(0)


@compiled
def finish(base_B: Any, sum_B: Any, divisor_B: Any, factor: Any) -> None:
    """Set `sum_B` to base + factor·sum/divisor; a divisor of zero counts as one."""
    for i in range(sum_B.shape[0]):
        divisor = divisor_B[i] if divisor_B[i] != 0 else np.float32(1)
        sum_B[i] = base_B[i] + factor * (sum_B[i] / divisor)


@compiled
def product(x_B: Any, y_B: Any) -> Any:
    """Return Σ x·y in float64, in LANES partial sums that are added in order."""
    partial = np.zeros(LANES)
    whole = x_B.shape[0] // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            partial[lane] += np.float64(x_B[start + lane]) * np.float64(y_B[start + lane])
    total = 0.0
    for lane in range(LANES):
        total += partial[lane]
    for i in range(whole, x_B.shape[0]):
        total += np.float64(x_B[i]) * np.float64(y_B[i])
    return total


@compiled
def gram(sums_RKK: Any, tau_KB: Any, offset: int, row: int) -> None:
    """Add ⟨τᵢ, τⱼ⟩, j ≤ i, of each row of `row` elements to `sums_RKK`; the block begins at place `offset` of one."""
    start, r, stop = 0, 0, row - offset
    while start < tau_KB.shape[1]:
        stop = min(stop, tau_KB.shape[1])
        for i in range(tau_KB.shape[0]):
            for j in range(i + 1):
                sums_RKK[r, i, j] += product(tau_KB[i, start:stop], tau_KB[j, start:stop])
        start, r, stop = stop, r + 1, stop + row
