"""The compiled kernels, compared with float64, for all dtypes of the operands."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tolerance import assert_within, bound
from torch import Tensor

from engine.task_vectors.kernels import SPAN, add_differences, inner_products
from engine.task_vectors.kinds import as_operand
from engine.task_vectors.lanes import LANES

DTYPES = (torch.float32, torch.bfloat16)


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def stored(count: int, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    return [noise(count, seed).to(dtype) for seed, dtype in enumerate(dtypes, 1)]


def exact(tensors: list[Tensor], base: Tensor) -> npt.NDArray[np.float64]:
    return torch.stack([tensor.double() - base.double() for tensor in tensors]).numpy()


def products_error(terms_4N: npt.NDArray[np.float64]) -> float:
    """Return the error bound of sums of spans in float32: every term is rounded twice, then added, in any order.

    Added one after the other, the standard deviation of the error is 0.4·√n·u·‖terms‖₂, so that the bound of 2·√n·u is
    five standard deviations. SIMD lanes shorten the sums and reduce the error.
    """
    roundings = min(terms_4N.shape[1], SPAN) + 2
    return bound(roundings, float(np.linalg.norm(terms_4N, axis=1).max()), safety=2)


def sums_error(start: npt.ArrayLike, terms_4N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the error bound of six roundings (a difference, a product, four sums) of at most Σ |terms| each."""
    return bound(6, 1) * (np.abs(start) + np.abs(terms_4N).sum(axis=0))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 4, (torch.bfloat16,) * 4, DTYPES * 2])
@pytest.mark.parametrize("count", [1, 7, 64, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN + 5])
def test_products_are_the_dense_ones(count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    base, slope, experts = noise(count, 10), noise(count, 11), stored(count, dtypes)
    sums = np.full(4, 0.5)
    inner_products(sums, slope.numpy(), base.numpy(), *map(as_operand, experts), 0, count)
    terms = exact(experts, base) * slope.double().numpy()
    assert_within(sums, 0.5 + terms.sum(axis=1), products_error(terms))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 4, (torch.bfloat16,) * 4, DTYPES * 2])
@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_sums_are_the_dense_ones(count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    base, start, experts = noise(count, 10), noise(count, 11), stored(count, dtypes)
    alpha, found = np.array([0.3, 0.1, 0.7, 0.0], np.float32), start.clone()
    add_differences(found.numpy(), base.numpy(), *map(as_operand, experts), alpha, 0, count)
    terms = alpha.astype(np.float64)[:, None] * exact(experts, base)
    wanted = start.double().numpy() + terms.sum(axis=0)
    assert_within(found, wanted, sums_error(start.double().numpy(), terms))


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 3), (3, 40), (40, 100)])
def test_elements_outside_the_range_have_no_effect(first: int, last: int) -> None:
    base, slope, experts = noise(100, 10), noise(100, 11), stored(100, (torch.float32,) * 4)
    outside = np.ones(100, bool)
    outside[first:last] = False
    for tensor in (base, slope, *experts):
        tensor[torch.from_numpy(outside)] = torch.nan
    operands = [base.numpy(), *map(as_operand, experts)]
    sums = np.zeros(4)
    inner_products(sums, slope.numpy(), *operands, first, last)
    differences = exact(experts, base)[:, first:last]
    terms = differences * slope.double().numpy()[first:last]
    assert_within(sums, terms.sum(axis=1), products_error(terms))
    found = np.full(100, 2, np.float32)
    add_differences(found, *operands, np.ones(4, np.float32), first, last)
    assert (found[outside] == 2).all()
    assert_within(found[first:last], 2 + differences.sum(axis=0), sums_error(2, differences))


def test_every_bfloat16_number_is_widened_as_by_torch() -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    zeros, found = np.zeros(len(numbers), np.float32), np.zeros(len(numbers), np.float32)
    one = np.array([1, 0, 0, 0], np.float32)
    add_differences(found, zeros, *[as_operand(numbers)] * 4, one, 0, len(numbers))
    np.testing.assert_array_equal(found, numbers.float().numpy())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_four_are_added_in_their_order(order: tuple[int, ...]) -> None:
    """1 + 2⁻²⁴ rounds to 1 in float32, 1 + 2 · 2⁻²⁴ does not: the sum depends on the order of the terms."""
    small, terms = 2.0**-24, np.array([1.0, 2.0**-24, 2.0**-24], np.float32)[list(order)]
    operands = [np.full(40, term, np.float32) for term in (*terms, 0)]
    found = np.zeros(40, np.float32)
    add_differences(found, np.zeros(40, np.float32), *operands, np.ones(4, np.float32), 0, 40)
    wanted = np.float32(0)
    for term in terms:
        wanted += term
    assert wanted in (1, 1 + 2 * small)
    assert (found == wanted).all()


def test_a_small_difference_is_not_lost_beside_a_large_base() -> None:
    base = np.full(1000, 1024, np.float32)
    expert, sums = base + np.float32(2**-13), np.zeros(4)
    inner_products(sums, np.ones(1000, np.float32), base, *[expert] * 4, 0, 1000)
    assert (sums == 1000 * 2.0**-13).all()


def in_lanes(slope: Tensor, base: Tensor, expert: Tensor) -> float:
    """Return ⟨slope, expert − base⟩ in the order that the kernel promises, by numpy, which rounds every operation."""
    terms, total = slope.numpy() * (expert.float().numpy() - base.numpy()), 0.0
    for start in range(0, len(terms), SPAN):
        lanes = np.zeros(LANES, np.float32)
        for first in range(start, min(start + SPAN, len(terms)), LANES):
            row = terms[first : min(first + LANES, start + SPAN)]
            lanes[: len(row)] += row
        span = 0.0
        for lane in lanes:
            span += float(lane)
        total += span
    return total


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 4, (torch.bfloat16,) * 4, DTYPES * 2])
@pytest.mark.parametrize("count", [1, LANES - 1, LANES, SPAN - 1, 2 * SPAN + LANES + 3])
def test_the_order_of_the_sums_is_fixed(count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    base, slope, experts = noise(count, 10), noise(count, 11), stored(count, dtypes)
    sums = np.zeros(4)
    inner_products(sums, slope.numpy(), base.numpy(), *map(as_operand, experts), 0, count)
    assert sums.tolist() == [in_lanes(slope, base, expert) for expert in experts]


@pytest.mark.parametrize("first", range(1, 5))
def test_the_alignment_of_the_operands_has_no_effect(first: int) -> None:
    count = SPAN + 5
    tensors = [noise(count + first, seed) for seed in range(6)]
    shifted, own = np.zeros(4), np.zeros(4)
    inner_products(shifted, *[tensor.numpy() for tensor in tensors], first, first + count)
    inner_products(own, *[tensor[first:].clone().numpy() for tensor in tensors], 0, count)
    assert shifted.tolist() == own.tolist()


# Run as it is and for the oldest CPU of this architecture: without wide registers, and without fused operations.
BITS = """
import numpy as np
import torch
from engine.task_vectors.kernels import add_differences, inner_products
from engine.task_vectors.kinds import Stored
from engine.task_vectors.sums import mean_magnitudes

generator = np.random.default_rng(0)
floats = [generator.standard_normal(10_001).astype(np.float32) for _ in range(6)]
alpha = np.float32([0.1, 0.2, 0.3, 0.4])
for experts in (floats[2:], [(x.view(np.uint32) >> 16).astype(np.uint16) for x in floats[2:]]):
    sums, merged = np.zeros(4), np.zeros(10_001, np.float32)
    inner_products(sums, *floats[:2], *experts, 3, 9_990)
    add_differences(merged, floats[1], *experts, alpha, 3, 9_990)
    print(sums.tobytes().hex(), merged.tobytes().hex())
base, *taus = (torch.from_numpy(x) for x in floats)
magnitude, magnitudes = mean_magnitudes(base, [Stored(tau) for tau in taus])
print(magnitude.hex(), magnitudes.tobytes().hex())
"""


@pytest.mark.thorough
def test_the_bits_are_the_same_for_every_type_of_cpu() -> None:
    def bits(**settings: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", BITS],
            env=os.environ | settings,  # numpy warns of features that this CPU does not have
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    oldest = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "ATEN_CPU_CAPABILITY": "default"}
    assert bits() == bits(**oldest, NPY_DISABLE_CPU_FEATURES="X86_V3,X86_V4")
