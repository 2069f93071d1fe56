"""Compiled kernels for the two sums over all experts' elements: each element is read once, and τ is never stored.

torch has no operation that subtracts and multiplies at once. Its intermediate differences went through the cache, and a
pass over an expert took 1.5 times as long as reading it. Each kernel takes four experts, since several memory streams
use more bandwidth than one. An operand is float32 [n], or bfloat16 as the uint16 of its bits [n].
Every product and every sum is rounded by itself, in an order that the code fixes, so that the bits are those of any
CPU. A fused multiplication and addition, which not every CPU has, saves no time: memory is the limit.
Letters: B elements of a block.
Source: Expert Merging, arXiv 2509.25712, θₗ = θ₀,ₗ + Σₖ Σₛ αₖ,ₗ,ₛ · τₖ,ₗ,ₛ and its chain rule.
"""

from __future__ import annotations

from typing import Any

import numba
import numba.extending
import numpy as np

from engine.compiled import compiled
from engine.task_vectors.lanes import LANES, add_products

# Number of elements whose products are summed in float32; the sums of spans are added in float64.
SPAN = 1 << 12


def _widen(value: Any) -> Any:
    """Convert a stored number to float32. Exists only in compiled code, see `_widen_compiled`."""
    raise NotImplementedError


@numba.extending.overload(_widen)  # type: ignore[untyped-decorator]
def _widen_compiled(value: Any) -> Any:
    def as_it_is(value: Any) -> Any:
        return value

    def from_bits(value: Any) -> Any:
        # bfloat16 is the upper half of a float32.
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    return from_bits if isinstance(value, numba.types.Integer) else as_it_is


def _add_differences(
    sum_B: Any, base_B: Any, x0_B: Any, x1_B: Any, x2_B: Any, x3_B: Any, alpha: Any, first: int, last: int
) -> None:
    """Add Σᵢ αᵢ · (xᵢ − base) to `sum_B` from `first` to `last`, in float32; the four terms are added in order.

    `alpha` is float32 [4]. An `x` may be a bfloat16 operand; `sum_B` and `base_B` are float32.
    """
    sums, base = sum_B[first:last], base_B[first:last]
    x0, x1, x2, x3 = x0_B[first:last], x1_B[first:last], x2_B[first:last], x3_B[first:last]
    a0, a1, a2, a3 = alpha[0], alpha[1], alpha[2], alpha[3]
    for i in range(base.shape[0]):
        sums[i] = (
            sums[i]
            + a0 * (_widen(x0[i]) - base[i])
            + a1 * (_widen(x1[i]) - base[i])
            + a2 * (_widen(x2[i]) - base[i])
            + a3 * (_widen(x3[i]) - base[i])
        )


def _inner_products(
    sums: Any, slope_B: Any, base_B: Any, x0_B: Any, x1_B: Any, x2_B: Any, x3_B: Any, first: int, last: int
) -> None:
    """Add ⟨slope, xᵢ − base⟩ from `first` to `last` to `sums` [4], float64.

    Each span is summed in `LANES` partial sums in float32, which are added in order in float64.
    """
    partial = np.empty((4, LANES), np.float32)
    for start in range(first, last, SPAN):
        stop = min(start + SPAN, last)
        slope, base = slope_B[start:stop], base_B[start:stop]
        x0, x1, x2, x3 = x0_B[start:stop], x1_B[start:stop], x2_B[start:stop], x3_B[start:stop]
        partial[:] = 0
        rows = (stop - start) // LANES
        add_products(partial, slope, base, x0, x1, x2, x3, rows)
        for i in range(rows * LANES, stop - start):
            lane = i - rows * LANES
            partial[0, lane] += slope[i] * (_widen(x0[i]) - base[i])
            partial[1, lane] += slope[i] * (_widen(x1[i]) - base[i])
            partial[2, lane] += slope[i] * (_widen(x2[i]) - base[i])
            partial[3, lane] += slope[i] * (_widen(x3[i]) - base[i])
        for k in range(4):
            total = 0.0
            for lane in range(LANES):
                total += partial[k, lane]
            sums[k] += total


# Each combination of operand types is compiled at its first call, which takes half a second. The GIL is released.
add_differences = compiled(_add_differences)
inner_products = compiled(_inner_products)
