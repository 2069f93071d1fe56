"""The calibration of singular values (SVC) beside the paper's equations, one direction after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from weight_space import noise

from engine.methods.arithmetic.spectral import spectral_calibration

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(tau: Tensor, taus: list[Tensor], alpha: float) -> Tensor:
    u, s, vt = torch.linalg.svd(tau.double(), full_matrices=False)
    result = torch.zeros_like(tau, dtype=torch.float64)
    for r in range(len(s)):
        merged = tau.double().T @ u[:, r]
        shares = []
        for own in taus:
            response = own.double().T @ u[:, r]
            shares.append(max(alpha, float(merged @ response / (response @ response))))
        result += len(taus) / sum(shares) * s[r] * torch.outer(u[:, r], vt[r])
    return result


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("shape", [(17, 11), (9, 23)], ids=str)
def test_it_is_the_papers(shape: tuple[int, int], alpha: float) -> None:
    taus = [noise(shape, seed) + 0.7 * noise(shape, 9) for seed in range(3)]
    tau = 0.4 * sum(taus, torch.zeros(shape))
    expected = reference(tau, taus, alpha)
    found = spectral_calibration(tau, iter(taus), alpha)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_equal_experts_that_were_added_up_are_counted_once() -> None:
    own = noise((8, 12), 0)
    found = spectral_calibration(3 * own, [own] * 3, 0.1)
    assert torch.allclose(found, own, atol=1e-5)


def test_experts_that_share_nothing_are_as_they_were() -> None:
    left, right = torch.zeros(6, 10), torch.zeros(6, 10)
    left[:3, :5], right[3:, 5:] = noise((3, 5), 1), noise((3, 5), 2)
    found = spectral_calibration(left + right, [left, right], 1.0)
    assert torch.allclose(found, left + right, atol=1e-5)


def test_a_merge_that_changes_nothing_and_an_expert_without_a_response() -> None:
    own, nothing = noise((6, 10), 1), torch.zeros(6, 10)
    assert torch.equal(spectral_calibration(nothing, [own], 0.1), nothing)
    assert torch.allclose(spectral_calibration(own, [own, nothing, nothing], 0.5), own, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_adapters_of_orthogonal_directions_are_as_they_were(alpha: float) -> None:
    """In floats, the response of one to a direction of the other is rounding, of either sign."""
    left, right = (torch.linalg.qr(noise((size, 16), seed))[0] for seed, size in enumerate((96, 64)))
    taus = [left[:, part] @ torch.diag(torch.linspace(1, 3, 8)) @ right[:, part].T for part in (slice(8), slice(8, 16))]
    merged = taus[0] + taus[1]
    found = spectral_calibration(merged, taus, alpha)
    # Rounding of float32; 1.07e-5 on a CPU with AMX.
    assert float((found - merged).norm() / merged.norm()) < 2e-5
