"""Coefficients in closed form beside the objective on the layers' outputs, computed from the inputs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from one_tensor import Known, merged, seen, tensor_of
from torch import Tensor

from engine.errors import CheckpointError
from engine.methods.arithmetic import projection
from engine.methods.arithmetic.projection import Projection, projection_of
from engine.methods.closed_form import PREPASSES
from engine.methods.prepass import Group

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS, INPUTS, EXPERTS = 9, 16, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = normal(OUTPUTS, INPUTS, seed=0)
TAUS = [(0.1 * (1 + k) * normal(OUTPUTS, INPUTS, seed=1 + k)).float().double() for k in range(EXPERTS)]
XS = [normal(INPUTS, 20 + k, seed=9 + k) for k in range(EXPERTS)]


def objective(alpha: Tensor, taus: list[Tensor] = TAUS, xs: list[Tensor] = XS) -> Tensor:
    mixed = sum((a * tau for a, tau in zip(alpha, taus, strict=True)), torch.zeros(()))
    parts = [((mixed - tau) @ x).square().sum() / x.shape[1] for tau, x in zip(taus, xs, strict=True)]
    return sum(parts, torch.zeros(()))


def projected(taus: list[Tensor] = TAUS, xs: list[Tensor] = XS) -> Projection:
    with ThreadPoolExecutor(1) as pool:
        base = torch.zeros_like(BASE).float()
        found = projection_of(tensor_of("closed_form", base, taus, [seen(x) for x in xs], pool=pool))
    assert found is not None
    return found


def test_the_gradient_of_the_objective_vanishes_at_the_coefficients() -> None:
    found = projected()
    alpha = found.coefficients().requires_grad_()
    value = objective(alpha)
    (gradient,) = torch.autograd.grad(value, alpha)
    zero = float(objective(torch.zeros(EXPERTS)))
    assert float(gradient.abs().max()) / zero < 1e-5
    assert found.energy == pytest.approx(zero, rel=1e-6)
    assert found.residual(alpha.detach()) == pytest.approx(float(value.detach()) / zero, rel=1e-5)


def test_the_residual_of_any_coefficients_is_that_of_the_objective() -> None:
    found = projected()
    alpha = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    zero = float(objective(torch.zeros(EXPERTS)))
    assert found.residual(alpha) == pytest.approx(float(objective(alpha)) / zero, rel=1e-5)
    assert found.residual(torch.zeros(EXPERTS)) == 1


def test_a_ridge_shrinks_the_coefficients() -> None:
    found = projected()
    scale = float(found.matrix_KK.diagonal().mean())
    alpha = found.coefficients(ridge=0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(alpha) + 0.5 * scale * alpha.square().sum(), alpha)
    assert float(gradient.abs().max()) / found.energy < 1e-5
    assert float(found.coefficients(ridge=1e9).abs().max()) < 1e-6


def test_equal_experts_have_equal_coefficients_and_nothing_is_left() -> None:
    found = projected([TAUS[0]] * EXPERTS, XS)
    torch.testing.assert_close(found.coefficients(), torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64))
    assert found.residual(found.coefficients()) < 1e-6


def test_experts_with_inputs_of_their_own_keep_their_task_vectors() -> None:
    xs = [torch.zeros(INPUTS, 20, dtype=torch.float64) for _ in range(EXPERTS)]
    taus = []
    for k, x in enumerate(xs):
        x[5 * k : 5 * k + 5] = normal(5, 20, seed=40 + k)
        tau = torch.zeros_like(BASE)
        tau[:, 5 * k : 5 * k + 5] = normal(OUTPUTS, 5, seed=50 + k)
        taus.append(tau)
    found = projected(taus, xs)
    torch.testing.assert_close(found.coefficients(), torch.ones(EXPERTS, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_task_vector_of_zeros_has_no_part() -> None:
    found = projected([TAUS[0], torch.zeros_like(BASE), TAUS[2]], XS)
    assert found.coefficients()[1] == 0


def test_layers_without_changes_leave_nothing() -> None:
    found = projected([torch.zeros_like(BASE)] * EXPERTS, XS)
    assert found.residual(found.coefficients()) == 0
    assert not found.coefficients().any()


def test_equations_of_layers_add_up() -> None:
    one, two = projected(), projected([TAUS[2], TAUS[0], TAUS[1]], XS)
    alpha = (one + two).coefficients().requires_grad_()
    value = objective(alpha) + objective(alpha, [TAUS[2], TAUS[0], TAUS[1]])
    (gradient,) = torch.autograd.grad(value, alpha)
    assert float(gradient.abs().max()) / (one + two).energy < 1e-5


def by_method(statistics: list[Known], **options: float) -> Tensor:
    (prepass,) = PREPASSES
    with ThreadPoolExecutor(1) as pool:
        tensor = tensor_of("closed_form", BASE.float(), TAUS, statistics, pool=pool, **options)
        known = {prepass.name: prepass.conclude({tensor.name: prepass.measure(tensor)}, Group())}
    return merged("closed_form", BASE, TAUS, statistics, known=known, **options)


def test_the_method_merges_by_the_coefficients() -> None:
    found = by_method([seen(x) for x in XS], **{"lambda": 0.5})
    alpha = projected().coefficients()
    expected = BASE + 0.5 * sum((a * tau for a, tau in zip(alpha, TAUS, strict=True)), torch.zeros(()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_tensors_without_samples_are_averaged() -> None:
    found = by_method([Known()] * EXPERTS)
    torch.testing.assert_close(found.double(), BASE + sum(TAUS, torch.zeros(())) / EXPERTS, rtol=0, atol=1e-6)


def test_rows_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = projected()
    monkeypatch.setattr(projection, "PIECE", 2 * INPUTS * EXPERTS)
    parts = projected()
    torch.testing.assert_close(parts.matrix_KK, whole.matrix_KK, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.right_K, whole.right_K, rtol=1e-6, atol=0)


def test_a_task_vector_that_is_not_finite_is_an_error() -> None:
    broken = TAUS[1].clone()
    broken[2, 3] = torch.nan
    with pytest.raises(CheckpointError, match="expert1"):
        projected([TAUS[0], broken, TAUS[2]])
