"""Fisher merging beside the equation of its paper, and beside the joint optimum of quadratic losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from one_tensor import Known, merged, tensor_of
from torch import Tensor

from engine.methods.fisher import NORMS, PREPASSES
from engine.methods.prepass import Group

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = normal(5, 7, seed=0)
TAUS = [normal(5, 7, seed=1 + k) for k in range(EXPERTS)]
FISHERS = [normal(5, 7, seed=10 + k).square() * 10.0**k for k in range(EXPERTS)]
NORM = [float(fisher.norm()) for fisher in FISHERS]
STATISTICS = [Known(information=fisher.float()) for fisher in FISHERS]


def fisher_merge(norms: list[float] = NORM, **options: object) -> Tensor:
    return merged("fisher", BASE, TAUS, STATISTICS, known={NORMS: norms}, **options).double()


def test_it_is_the_weighted_mean_of_the_experts() -> None:
    own = [{"weight": weight} for weight in (1.0, 0.5, 2.0)]
    factors = [weight["weight"] * (fisher / fisher.norm() + 1e-6) for weight, fisher in zip(own, FISHERS, strict=True)]
    above = sum((factor * (BASE + tau) for factor, tau in zip(factors, TAUS, strict=True)), torch.zeros(()))
    expected = above / sum(factors, torch.zeros(()))
    torch.testing.assert_close(fisher_merge(own=own), expected, rtol=0, atol=1e-5)


def test_of_quadratic_losses_it_is_the_joint_optimum() -> None:
    """The Fisher information of a Gaussian is the Hessian of its loss; the norms, which would weight it, are 1."""
    found = fisher_merge(norms=[1.0] * EXPERTS, floor=0.0).requires_grad_()
    loss = sum(
        ((fisher * (found - BASE - tau).square()).sum() for fisher, tau in zip(FISHERS, TAUS, strict=True)),
        torch.zeros(()),
    )
    (gradient,) = torch.autograd.grad(loss, found)
    scale = sum((fisher * tau.abs() for fisher, tau in zip(FISHERS, TAUS, strict=True)), torch.zeros(()))
    assert float((gradient / scale).abs().max()) < 1e-5


def test_norms_are_those_of_the_whole_model() -> None:
    (prepass,) = PREPASSES
    parts = [
        tensor_of("fisher", BASE[rows], [tau[rows] for tau in TAUS], [Known(information=f[rows]) for f in FISHERS])
        for rows in (slice(0, 2), slice(2, 5))
    ]
    found = prepass.conclude(np.sum([prepass.measure(part) for part in parts], axis=0), Group())
    assert found == pytest.approx(NORM)


def test_without_information_of_an_expert_the_models_are_averaged() -> None:
    own = [{"weight": weight} for weight in (1.0, 0.5, 2.5)]
    statistics = [*STATISTICS[:2], Known()]
    found = merged("fisher", BASE, TAUS, statistics, known={NORMS: NORM}, own=own).double()
    expected = BASE + 0.25 * TAUS[0] + 0.125 * TAUS[1] + 0.625 * TAUS[2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_elements_without_any_weight_keep_the_base() -> None:
    own = [{"weight": 0.0}] * EXPERTS
    assert torch.equal(fisher_merge(own=own).float(), BASE.float())
    zeros = [Known(information=torch.zeros(5, 7))] * EXPERTS
    found = merged("fisher", BASE, TAUS, zeros, known={NORMS: [0.0] * EXPERTS}, floor=0.0)
    assert torch.equal(found, BASE.float())
