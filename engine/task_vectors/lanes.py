"""A loop of inner products with a fixed number of partial sums, so that its bits do not depend on the CPU.

A compiler that may reorder a sum splits it into as many partial sums as the CPU's registers hold; the last bits then
change from one type of CPU to the next. One that may not reorder it adds one element at a time, which is slow.
The loop here is written with vectors of `LANES` elements, which LLVM maps to the registers of any CPU: partial sum i
holds the terms i, i + LANES, i + 2 · LANES, …, each product and each sum rounded by itself.
"""

from __future__ import annotations

from typing import Any

import numba.extending
from llvmlite import ir
from numba.core import cgutils, types

# Partial sums of one inner product. One register of AVX-512, two of AVX2. Twice as many were 6 % slower on AVX2.
LANES = 16

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def add_products(
    context: Any, sums: Any, slope: Any, base: Any, x0: Any, x1: Any, x2: Any, x3: Any, count: Any
) -> tuple[Any, Any]:
    """Add slope · (xᵢ − base) of the first `count` · LANES elements to the partial sums `sums` [4, LANES], float32.

    `slope` and `base` are contiguous and float32; an `x` is contiguous and float32, or bfloat16 as uint16. Exists only
    in compiled code.
    """
    del context
    assert all(array.layout == "C" for array in (sums, slope, base, x0, x1, x2, x3))
    return types.void(sums, slope, base, x0, x1, x2, x3, count), _generate


def _generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    sums, slope, base, *experts = (
        context.make_array(kind)(context, builder, array).data
        for kind, array in zip(signature.args[:-1], arguments[:-1], strict=True)
    )
    partial = [builder.gep(sums, [ir.Constant(ir.IntType(64), i * LANES)]) for i in range(len(experts))]
    # On the stack, which LLVM turns into registers.
    totals = [cgutils.alloca_once_value(builder, _load(builder, start)) for start in partial]
    with cgutils.for_range(builder, arguments[-1]) as loop:
        first = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
        slopes, bases = (_load(builder, builder.gep(array, [first])) for array in (slope, base))
        for total, expert in zip(totals, experts, strict=True):
            tau = builder.fsub(_load(builder, builder.gep(expert, [first])), bases)
            builder.store(builder.fadd(builder.load(total), builder.fmul(slopes, tau)), total)
    for start, total in zip(partial, totals, strict=True):
        builder.store(builder.load(total), builder.bitcast(start, _FLOATS.as_pointer())).align = 4
    return context.get_dummy_value()


def _load(builder: Any, start: Any) -> Any:
    """Load LANES elements from `start` as float32; bfloat16 is the upper half of a float32."""
    stored = _FLOATS if start.type.pointee == ir.FloatType() else _HALVES
    loaded = builder.load(builder.bitcast(start, stored.as_pointer()))
    # An array starts at any element. Without this, LLVM assumes the alignment of the vector.
    loaded.align = 4 if stored is _FLOATS else 2
    if stored is _FLOATS:
        return loaded
    upper = builder.shl(builder.zext(loaded, _INTEGERS), ir.Constant(_INTEGERS, [16] * LANES))
    return builder.bitcast(upper, _FLOATS)
