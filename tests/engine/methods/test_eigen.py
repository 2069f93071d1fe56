"""Leading eigenvectors of a large matrix in float32 beside float64, where the cut is between close eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.methods.arithmetic.eigen import FLOAT32_SIDE, add_gram, leading_eigenvectors, symmetric

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, KEPT = FLOAT32_SIDE + 8, 300


def gram(values: Tensor) -> Tensor:
    """Return a matrix with these eigenvalues, rounded to float32."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return ((q * values) @ q.T).float()


def falling() -> Tensor:
    return torch.logspace(-4, 0, SIDE, dtype=torch.float64)


def projector(vectors: Tensor) -> Tensor:
    return vectors.double() @ vectors.double().T


def test_close_eigenvalues_at_the_cut_are_told_apart() -> None:
    values = falling()
    values[SIDE - KEPT] = values[SIDE - KEPT - 1] + 2e-6
    matrix = gram(values)
    wanted, exact = torch.linalg.eigh(matrix.double())
    plain = torch.linalg.eigh(matrix)[1][:, -KEPT:]
    found, vectors = leading_eigenvectors(matrix, lambda _: KEPT)
    assert float((found - wanted[-KEPT:]).abs().max()) < 1e-6
    assert float((vectors.T @ vectors - torch.eye(KEPT)).abs().max()) < 1e-5
    apart = [float((projector(own) - projector(exact[:, -KEPT:])).norm()) for own in (vectors, plain)]
    assert apart[0] < 2e-3 and apart[1] > 10 * apart[0]


def test_null_directions_have_eigenvalues_of_zero() -> None:
    values = falling()
    values[:100] = 0
    found, vectors = leading_eigenvectors(gram(values), len)
    assert int((found == 0).sum()) == 100 and vectors.shape == (SIDE, SIDE)


def test_the_count_may_follow_from_the_eigenvalues_or_be_none_or_all() -> None:
    matrix = gram(falling())
    for count in (0, 1, SIDE - 1, SIDE, SIDE + 5):
        assert leading_eigenvectors(matrix, lambda _, count=count: count)[1].shape == (SIDE, min(count, SIDE))
    found, _ = leading_eigenvectors(matrix, lambda values: int((values > 0.5).sum()))
    assert len(found) == int((falling() > 0.5).sum())


def test_a_gram_matrix_by_its_upper_triangle() -> None:
    generator = torch.Generator().manual_seed(1)
    taus = [torch.randn(20, SIDE, generator=generator) for _ in range(2)]
    total = torch.zeros(SIDE, SIDE)
    for tau in taus:
        add_gram(total, tau, 0.5)
    wanted = sum(0.5 * tau.double().T @ tau.double() for tau in taus)
    assert torch.equal(symmetric(total), total.T)
    assert float((total - wanted).norm() / wanted.norm()) < 1e-6
