"""The regression of layers beside its objective, and beside dense solutions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.methods.arithmetic import regression
from engine.methods.arithmetic.regression import Inverse, solve

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS, INPUTS, SAMPLES, EXPERTS = 7, 12, 60, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(samples: int = SAMPLES) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """An anchor, weights of experts near it, and the inputs of the merged layer and of the experts [I, N]."""
    anchor = normal(OUTPUTS, INPUTS, seed=0)
    weights = [anchor + 0.1 * normal(OUTPUTS, INPUTS, seed=10 + k) for k in range(EXPERTS)]
    merged = [normal(INPUTS, samples, seed=20 + k) for k in range(EXPERTS)]
    own = [s + 0.1 * normal(INPUTS, samples, seed=30 + k) for k, s in enumerate(merged)]
    return anchor, weights, merged, own


def sides(weights: list[Tensor], merged: list[Tensor], own: list[Tensor]) -> tuple[Tensor, Tensor]:
    numerator = sum((w @ t @ s.T for w, s, t in zip(weights, merged, own, strict=True)), torch.zeros(()))
    return numerator.float(), sum((s @ s.T for s in merged), torch.zeros(())).float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_it_minimises_the_objective() -> None:
    anchor, weights, merged, own = layers()
    ridge = 5.0
    found = solve(*sides(weights, merged, own), ridge, anchor.float()).double().requires_grad_()
    loss = ridge * (found - anchor).square().sum()
    for w, s, t in zip(weights, merged, own, strict=True):
        loss = loss + (found @ s - w @ t).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    scale = 2 * float(sum((s @ s.T for s in merged), torch.zeros(())).norm() * found.detach().norm())
    assert float(gradient.norm()) / scale < 1e-6


def test_one_expert_is_returned_and_an_infinite_ridge_returns_the_anchor() -> None:
    anchor, weights, merged, own = layers()
    one = solve(*sides(weights[:1], merged[:1], merged[:1]))
    assert relative(one, weights[0]) < 1e-6
    alike = solve(*sides([weights[0]] * 3, merged, merged), 0.05, weights[0].float())
    assert relative(alike, weights[0]) < 1e-6
    far = solve(*sides(weights, merged, own), 1e12, anchor.float())
    assert relative(far, anchor) < 1e-6


@pytest.mark.parametrize("samples", [1, 3, SAMPLES])
def test_directions_without_samples_keep_the_anchor(samples: int) -> None:
    anchor, weights, merged, _ = layers(samples)
    numerator, gram = sides(weights, merged, merged)
    found = solve(numerator, gram, anchor_OI=anchor.float(), rcond=1e-6)
    expected = anchor + (numerator.double() - anchor @ gram.double()) @ torch.linalg.pinv(
        gram.double(), rtol=1e-6, hermitian=True
    )
    assert relative(found, expected) < 1e-5
    # A direction orthogonal to all samples.
    unseen = torch.eye(INPUTS, dtype=torch.float64) - torch.linalg.pinv(gram.double(), rtol=1e-6) @ gram.double()
    assert float(((found - anchor) @ unseen).norm()) < 1e-5


@pytest.mark.parametrize("decades", [2, 5, 9])
def test_the_precision_follows_the_condition(decades: int) -> None:
    basis = torch.linalg.qr(normal(INPUTS, INPUTS, seed=1))[0]
    values = torch.logspace(0, -decades, INPUTS, dtype=torch.float64)
    gram = (basis * values) @ basis.T
    weight = normal(OUTPUTS, INPUTS, seed=2)
    inverse = Inverse(gram, rcond=1e-7)
    assert inverse.dtype == (torch.float32 if decades == 2 else torch.float64)
    assert inverse.is_pseudo == (decades == 9)
    seen = basis[:, values >= 1e-7]
    assert relative(inverse.divide(weight @ gram), weight @ seen @ seen.T) < 1e-5


def test_a_gram_matrix_of_zeros_leaves_the_anchor() -> None:
    anchor = normal(OUTPUTS, INPUTS, seed=0).float()
    zeros = torch.zeros(INPUTS, INPUTS)
    assert torch.equal(solve(torch.zeros(OUTPUTS, INPUTS), zeros, anchor_OI=anchor), anchor)


@pytest.mark.parametrize("samples", [3, SAMPLES])
def test_rows_are_divided_in_parts(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    anchor, weights, merged, own = layers(samples)
    given = (*sides(weights, merged, own), 0.0, anchor.float(), 1e-6)
    whole = solve(*given)
    monkeypatch.setattr(regression, "ROWS", 2)
    assert relative(solve(*given), whole.double()) < 1e-6


def test_a_gram_matrix_is_left_as_it_is() -> None:
    _, weights, merged, own = layers()
    numerator, gram = sides(weights, merged, own)
    before = gram.clone()
    solve(numerator, gram, 3.0)
    assert torch.equal(gram, before)
