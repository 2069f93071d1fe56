"""LOT and RegMean beside the equations of their papers, solved densely in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_tensor import Known, merged, seen
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS, INPUTS, EXPERTS = 9, 16, 3
FEW, MANY = 4, 100


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = normal(OUTPUTS, INPUTS, seed=0)
TAUS = [0.1 * (1 + k) * normal(OUTPUTS, INPUTS, seed=1 + k) for k in range(EXPERTS)]


def inputs(samples: int) -> list[Tensor]:
    """Inputs [I, N] of each expert, of which features have other sizes; the number of tokens differs by expert."""
    sizes = torch.linspace(0.2, 2, INPUTS, dtype=torch.float64)[:, None]
    return [sizes * normal(INPUTS, samples + k, seed=50 + k) for k in range(EXPERTS)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def lot(xs: list[Tensor], rcond: float = 1e-6, ridge: float = 0.0) -> Tensor:
    """LOT's task vector, from the equation of the paper; with a ridge, that of least squares with a penalty."""
    total = sum((x @ x.T for x in xs), torch.zeros(()))
    right = sum((tau @ x @ x.T for tau, x in zip(TAUS, xs, strict=True)), torch.zeros(()))
    if ridge:
        total = total + ridge * total.trace() / INPUTS * torch.eye(INPUTS, dtype=torch.float64)
        return right @ torch.linalg.inv(total)
    return right @ torch.linalg.pinv(total, rtol=rcond, hermitian=True)


def shrunk(x: Tensor, alpha: float) -> Tensor:
    gram = x @ x.T / x.shape[1]
    return alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


def regmean(xs: list[Tensor], alpha: float) -> Tensor:
    """RegMean's weight, from the equation of the paper."""
    grams = [shrunk(x, alpha) for x in xs]
    right = sum(((BASE + tau) @ gram for tau, gram in zip(TAUS, grams, strict=True)), torch.zeros(()))
    return right @ torch.linalg.inv(sum(grams, torch.zeros(())))


@pytest.mark.parametrize("as_gram", [True, False])
@pytest.mark.parametrize("samples", [FEW, MANY])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_lot(samples: int, ridge: float, as_gram: bool) -> None:
    xs = inputs(samples)
    found = merged("lot", BASE, TAUS, [seen(x, as_gram) for x in xs], ridge=ridge, **{"lambda": 0.7})
    assert relative(found - BASE.float(), 0.7 * lot(xs, ridge=ridge)) < 1e-5


@pytest.mark.parametrize("rcond", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("as_gram", [True, False])
def test_the_pseudo_inverse_leaves_out_what_is_below_rcond(rcond: float, as_gram: bool) -> None:
    xs = inputs(FEW)
    found = merged("lot", BASE, TAUS, [seen(x, as_gram) for x in xs], rcond=rcond)
    assert relative(found - BASE.float(), lot(xs, rcond)) < 1e-5


# A Gram matrix is float32, whose rounding a ridge has to be above.
@pytest.mark.parametrize(("ridge", "as_gram"), [(0.0, True), (0.0, False), (1e-2, True), (1e-4, False)])
def test_samples_that_begin_alike(ridge: float, as_gram: bool) -> None:
    xs = inputs(FEW)
    common = (20 * xs[0][:, :1]).float().double()
    for x in xs:
        x[:, :3] = common
    found = merged("lot", BASE, TAUS, [seen(x, as_gram) for x in xs], ridge=ridge)
    assert relative(found - BASE.float(), lot(xs, ridge=ridge)) < 1e-4


@pytest.mark.parametrize("domain", ["task_vector", "weight"])
@pytest.mark.parametrize("alpha", [0.1, 0.9, 1.0])
def test_regmean(alpha: float, domain: str) -> None:
    xs = inputs(MANY)
    found = merged("regmean", BASE, TAUS, [seen(x) for x in xs], alpha=alpha, domain=domain)
    assert relative(found, regmean(xs, alpha)) < 1e-5


def test_regmean_of_equally_many_tokens_without_shrinking_is_lot() -> None:
    xs = [x[:, :MANY] for x in inputs(MANY)]
    statistics = [seen(x) for x in xs]
    expected = merged("lot", BASE, TAUS, statistics)
    assert relative(merged("regmean", BASE, TAUS, statistics, alpha=1.0, domain="weight"), expected.double()) < 1e-6


def test_of_few_samples_the_domain_of_weights_loses_the_base_and_that_of_task_vectors_keeps_it() -> None:
    xs = inputs(FEW)
    statistics = [seen(x) for x in xs]
    unseen = torch.eye(INPUTS, dtype=torch.float64) - torch.linalg.pinv(torch.cat(xs, 1).T) @ torch.cat(xs, 1).T
    kept = merged("regmean", BASE, TAUS, statistics, alpha=1.0).double()
    lost = merged("regmean", BASE, TAUS, statistics, alpha=1.0, domain="weight").double()
    assert relative(kept @ unseen, BASE @ unseen) < 1e-6
    assert float((lost @ unseen).norm()) < 1e-4 * float((BASE @ unseen).norm())


@pytest.mark.parametrize("method", ["lot", "regmean"])
def test_one_expert_and_equal_experts_are_returned(method: str) -> None:
    xs = inputs(MANY)
    statistics = [seen(x) for x in xs]
    expected = BASE + TAUS[0]
    assert relative(merged(method, BASE, TAUS[:1], statistics[:1]), expected) < 1e-6
    assert relative(merged(method, BASE, TAUS[:1] * 3, statistics), expected) < 1e-6


@pytest.mark.parametrize("method", ["lot", "regmean"])
def test_experts_of_which_there_are_no_inputs_have_no_part(method: str) -> None:
    xs = inputs(MANY)
    statistics = [seen(xs[0]), None, seen(xs[2])]
    found = merged(method, BASE, TAUS, [statistics[0], Known(), statistics[2]])
    no_tokens = merged(method, BASE, TAUS, [statistics[0], seen(torch.zeros(INPUTS, 0)), statistics[2]])
    assert torch.equal(found, no_tokens)
    assert torch.equal(found, merged(method, BASE, [TAUS[0], TAUS[2]], [statistics[0], statistics[2]]))
    assert torch.equal(found, merged(method, BASE, TAUS, statistics))


@pytest.mark.parametrize("method", ["lot", "regmean"])
def test_an_expert_that_equals_the_base_keeps_its_outputs(method: str) -> None:
    statistics = [seen(x) for x in inputs(MANY)]
    none = merged(method, BASE, [TAUS[0], None], statistics[:2])
    assert torch.equal(none, merged(method, BASE, [TAUS[0], torch.zeros_like(BASE)], statistics[:2]))


OTHERS: list[tuple[Tensor, dict[str, Any]]] = [
    (normal(OUTPUTS, seed=3), {}),
    (BASE, {"is_vocabulary": True}),
]


@pytest.mark.parametrize("method", ["lot", "regmean"])
@pytest.mark.parametrize(("base", "options"), OTHERS, ids=["bias", "embedding"])
def test_tensors_that_are_no_layers_are_averaged(method: str, base: Tensor, options: dict[str, Any]) -> None:
    taus = [normal(*base.shape, seed=20 + k) for k in range(EXPERTS)]
    statistics = [seen(x) if base.dim() == 2 else Known() for x in inputs(MANY)]
    found = merged(method, base, taus, statistics, **options)
    assert relative(found, base + sum(taus, torch.zeros(())) / EXPERTS) < 1e-6


def test_features_that_are_always_zero_keep_the_base() -> None:
    xs = inputs(MANY)
    for x in xs:
        x[3] = 0
    statistics = [seen(x) for x in xs]
    for method in ("lot", "regmean"):
        found = merged(method, BASE, TAUS, statistics)
        assert torch.equal(found[:, 3], BASE.float()[:, 3])
