"""Factors of task vectors: merges and gradients against dense sums, for chunks that end anywhere in the matrix."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.task_vectors.coefficients import TensorCoefficients, chunk_edges
from engine.task_vectors.factors import (
    Factors,
    merge_factors,
    project,
    project_directions,
    scaled_products,
    sum_directions,
)
from engine.task_vectors.kinds import Product

F64 = torch.float64


def made(shape: tuple[int, int], ranks: tuple[int, ...], seed: int = 0, dtype: torch.dtype = F64) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], sum(ranks), generator=generator, dtype=F64)
    right = torch.randn(sum(ranks), shape[1], generator=generator, dtype=F64)
    return Factors(left.to(dtype), right.to(dtype), ranks)


def dense(factors: Factors) -> list[Tensor]:
    shape = (len(factors.left_mR), factors.right_Rn.shape[1])
    return [torch.zeros(shape, dtype=F64) if p is None else p.left @ p.right for p in factors.products()]


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple),
    chunks=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_merges_and_gradients_are_the_dense_sums(
    shape: tuple[int, int], ranks: tuple[int, ...], chunks: int, seed: int
) -> None:
    factors, numel = made(shape, ranks, seed), shape[0] * shape[1]
    edges = chunk_edges(numel, chunks)
    values = np.random.default_rng(seed).uniform(0, 1, (len(ranks), len(edges) - 1)).astype(np.float32)
    base_mn, gradient_mn = dense(made(shape, (1, 1), seed))
    out_mn = torch.empty(shape, dtype=F64)
    merge_factors(base_mn, factors, TensorCoefficients(edges, values), out_mn)
    alpha_KN = torch.from_numpy(np.repeat(values.astype(np.float64), np.diff(edges), axis=1))
    wanted = base_mn + sum(alpha.view(shape) * tau for alpha, tau in zip(alpha_KN, dense(factors), strict=True))
    torch.testing.assert_close(out_mn, wanted, rtol=0, atol=1e-13)
    found = project(gradient_mn, factors, edges)
    exact = [[(gradient_mn * tau).view(-1)[a:b].sum() for a, b in pairwise(edges)] for tau in dense(factors)]
    torch.testing.assert_close(found, torch.tensor(exact, dtype=F64), rtol=0, atol=1e-12)


def test_the_gradient_is_the_slope_of_the_merge() -> None:
    shape, ranks, edges = (7, 5), (2, 3), chunk_edges(35, 3)
    factors, values = made(shape, ranks), np.full((2, len(edges) - 1), 0.5, np.float32)
    (gradient_mn,), base_mn = dense(made(shape, (3,), seed=1)), torch.zeros(shape, dtype=F64)

    def loss(values: np.ndarray) -> float:
        out_mn = torch.empty(shape, dtype=F64)
        merge_factors(base_mn, factors, TensorCoefficients(edges, values), out_mn)
        return float((gradient_mn * out_mn).sum())

    found = project(gradient_mn, factors, edges)
    for k, s in np.ndindex(values.shape):
        step = np.zeros_like(values)
        step[k, s] = 0.25
        assert (loss(values + step) - loss(values - step)) / 0.5 == pytest.approx(float(found[k, s]), rel=1e-10)


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple),
    more=st.integers(0, 2),
    chunks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_chunks_of_directions_are_the_dense_sums(
    shape: tuple[int, int], ranks: tuple[int, ...], more: int, chunks: int, seed: int
) -> None:
    """Also if experts have different numbers of directions, none, or fewer than the chunks cover."""
    factors = made(shape, ranks, seed)
    edges = chunk_edges(max(1, *ranks) + more, chunks)
    values = np.random.default_rng(seed).uniform(0, 1, (len(ranks), len(edges) - 1)).astype(np.float32)
    base_mn, gradient_mn = dense(made(shape, (1, 1), seed))
    wanted, slope = base_mn.clone(), np.zeros(values.shape)
    for k, product in enumerate(factors.products()):
        for r in range(ranks[k]):
            assert product is not None
            chunk = next(s for s, (a, b) in enumerate(pairwise(edges)) if a <= r < b)
            direction = product.left[:, r : r + 1] @ product.right[r : r + 1]
            wanted += float(values[k, chunk]) * direction
            slope[k, chunk] += float((gradient_mn * direction).sum())
    table = TensorCoefficients(edges, values, spectral=True)
    out_mn = torch.empty(shape, dtype=F64)
    merge_factors(base_mn, factors, table, out_mn)
    torch.testing.assert_close(out_mn, wanted, rtol=0, atol=1e-13)
    found = sum_directions(project_directions(gradient_mn, factors).numpy(), ranks, edges)
    np.testing.assert_allclose(found, slope, rtol=0, atol=1e-12)
    # The stream that writes the output takes the same sums from products.
    written = base_mn.float()
    for product in scaled_products(made(shape, ranks, seed, torch.float32).products(), table):
        if product is not None:
            tau_N = torch.empty(written.numel())
            product.block(0, written.numel(), tau_N, tau_N)
            written += tau_N.view(shape)
    torch.testing.assert_close(written.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_directions_is_the_slope_of_the_merge() -> None:
    shape, ranks, edges = (7, 5), (4, 3), (0, 2, 4)
    factors, values = made(shape, ranks), np.full((2, 2), 0.5, np.float32)
    gradient_mn = made(shape, (3,), seed=1).left_mR @ torch.ones(3, 5, dtype=F64)

    def loss(values: np.ndarray) -> float:
        out_mn = torch.empty(shape, dtype=F64)
        merge_factors(torch.zeros(shape, dtype=F64), factors, TensorCoefficients(edges, values, True), out_mn)
        return float((gradient_mn * out_mn).sum())

    found = sum_directions(project_directions(gradient_mn, factors).numpy(), ranks, edges)
    for k, s in np.ndindex(values.shape):
        step = np.zeros_like(values)
        step[k, s] = 0.25
        assert (loss(values + step) - loss(values - step)) / 0.5 == pytest.approx(found[k, s], rel=1e-10)


def test_products_side_by_side_are_those_of_their_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [None if q == 0 else Product(torch.randn(4, q, generator=generator), torch.randn(q, 6)) for q in (2, 0, 1)]
    factors = Factors.of(given, (4, 6))
    assert factors.ranks == (2, 0, 1) and factors.left_mR.shape == (4, 3) and factors.right_Rn.shape == (3, 6)
    for one, other in zip(factors.products(), given, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    assert Factors.of([None, None], (4, 6)).products() == [None, None]


def test_the_result_is_rounded_once() -> None:
    shape, ranks = (8, 16), (4, 4)
    factors, base_mn = made(shape, ranks, dtype=torch.float32), torch.randn(shape)
    wanted = TensorCoefficients((0, 128), np.full((2, 1), 0.5, np.float32))
    exact, rounded = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    merge_factors(base_mn, factors, wanted, exact)
    merge_factors(base_mn, factors, wanted, rounded)
    assert torch.equal(rounded, exact.bfloat16())
