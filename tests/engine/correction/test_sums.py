"""The equations of calibrated layers, against dense least squares in float64 and against cases with a known result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.correction.rules import Rule, featcal, regmean_plus_plus
from engine.correction.sums import Affine, InputSums, NormSums, added, anchor_of, solve_linear, solve_norm

INPUTS, OUTPUTS, TOKENS = 6, 5, (11, 9)
FEATCAL = featcal({"alpha": 0.3, "rho": 2.0, "ridge": 0.05})


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(seed: int) -> Affine:
    return Affine(draw(seed, OUTPUTS, INPUTS), draw(seed + 100, OUTPUTS))


def solved(
    experts: Sequence[Affine],
    s: Sequence[list[Tensor]],
    e: Sequence[list[Tensor]],
    merged: Affine,
    base: Affine,
    rule: Rule,
) -> Affine:
    """Solve one layer from each expert's samples of inputs in the merged model and in the expert."""
    shares = []
    for expert, of_merged, of_expert in zip(experts, s, e, strict=True):
        sums = InputSums()
        for one, other in zip(of_merged, of_expert, strict=True):
            sums.add(one, other if rule.has_expert_stream else None, rule)
        shares.append(sums.share({"layer": expert}, rule))
    return solve_linear(added(shares), {"layer": anchor_of(merged, base, rule)}, rule)["layer"]


def samples(seed: int) -> list[Tensor]:
    return [draw(seed + number, 1, count, INPUTS) for number, count in enumerate(TOKENS)]


def flat(xs: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double().numpy()


def test_featcal_solves_its_least_squares_problem() -> None:
    """Weights minimise Σₖ cₖ/Nₖ·‖S·Wᵀ − T·Wₖᵀ‖² + λ‖W − A‖²; biases are optimal for these weights."""
    experts, merged, base = [layer(1), layer(2)], layer(3), layer(4)
    s, e = [samples(10), samples(20)], [samples(30), samples(40)]
    found = solved(experts, s, e, merged, base, FEATCAL)
    rows, values = [], []
    anchor = (2 * merged.weight - base.weight).double().numpy()
    for expert, of_merged, of_expert in zip(experts, s, e, strict=True):
        x, t = flat(of_merged), 0.3 * flat(of_expert) + 0.7 * flat(of_merged)
        weight = np.sqrt(1 / np.linalg.norm(x.T @ x / len(x)) / len(x))
        rows.append(weight * x)
        values.append(weight * t @ expert.weight.double().numpy().T)
    rows.append(np.sqrt(0.05) * np.eye(INPUTS))
    values.append(np.sqrt(0.05) * anchor.T)
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0].T
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-4, atol=1e-5)

    above, below = np.zeros(OUTPUTS), 0.05
    for expert, of_merged, of_expert in zip(experts, s, e, strict=True):
        x, t = flat(of_merged), 0.3 * flat(of_expert) + 0.7 * flat(of_merged)
        c = 1 / np.linalg.norm(x.T @ x / len(x))
        assert expert.bias is not None
        residual = t @ expert.weight.double().numpy().T + expert.bias.double().numpy() - x @ expected.T
        above, below = above + c * residual.mean(0), below + c
    assert merged.bias is not None and base.bias is not None and found.bias is not None
    above += 0.05 * (2 * merged.bias - base.bias).double().numpy()
    np.testing.assert_allclose(found.bias.numpy(), above / below, rtol=1e-4, atol=1e-5)


def test_one_expert_on_the_merged_inputs_alone_is_returned() -> None:
    expert = layer(1)
    found = solved([expert], [samples(10)], [samples(30)], layer(3), layer(4), Rule(alpha=0, ridge=0))
    torch.testing.assert_close(found.weight, expert.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, expert.bias, rtol=1e-4, atol=1e-5)


def test_equal_experts_with_themselves_as_anchor_are_returned_also_where_inputs_are_few() -> None:
    expert = layer(1)
    few = [x[:, :1] for x in samples(10)]
    found = solved([expert, expert], [few, few], [few, few], expert, layer(4), Rule(rho=1, ridge=0.05))
    torch.testing.assert_close(found.weight, expert.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, expert.bias, rtol=1e-4, atol=1e-5)


def test_a_strong_ridge_gives_the_anchor() -> None:
    merged, base = layer(3), layer(4)
    found = solved([layer(1)], [samples(10)], [samples(30)], merged, base, Rule(alpha=0.3, rho=2.0, ridge=1e6))
    torch.testing.assert_close(found.weight, 2 * merged.weight - base.weight, rtol=1e-4, atol=1e-4)
    assert merged.bias is not None and base.bias is not None
    torch.testing.assert_close(found.bias, 2 * merged.bias - base.bias, rtol=1e-4, atol=1e-4)


def test_a_sample_without_inputs_in_some_direction_leaves_it_to_the_anchor() -> None:
    """Regression on the inputs that there are; all else is the merged weight, not zero."""
    merged = layer(3)
    s = [torch.cat([x[..., :4], torch.zeros(*x.shape[:-1], 2)], dim=-1) for x in samples(10)]
    rule = regmean_plus_plus(1.0)
    found = solved([layer(1)], [s], [s], merged, layer(4), rule)
    torch.testing.assert_close(found.weight[:, :4], layer(1).weight[:, :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weight[:, 4:], merged.weight[:, 4:], rtol=1e-4, atol=1e-4)
    assert found.bias is None


@pytest.mark.parametrize("factor", [1.0, 0.6])
def test_regmean_plus_plus_divides_by_the_sum_of_reduced_gram_matrices(factor: float) -> None:
    experts, s = [layer(1), layer(2)], [samples(10), samples(20)]
    found = solved(experts, s, s, layer(3), layer(4), regmean_plus_plus(factor))
    total, numerator = np.zeros((INPUTS, INPUTS)), np.zeros((OUTPUTS, INPUTS))
    for expert, of_merged in zip(experts, s, strict=True):
        gram = flat(of_merged).T @ flat(of_merged) / len(flat(of_merged))
        gram = factor * gram + (1 - factor) * np.diag(np.diag(gram))
        total += gram
        numerator += expert.weight.double().numpy() @ gram
    np.testing.assert_allclose(found.weight.numpy(), numerator @ np.linalg.inv(total), rtol=1e-4, atol=1e-5)


def test_layers_with_one_input_are_solved_as_if_each_were_alone() -> None:
    sums = InputSums()
    for one, other in zip(samples(10), samples(30), strict=True):
        sums.add(one, other, FEATCAL)
    both = {"q": layer(1), "k": Affine(layer(2).weight[:2])}
    anchors = {"q": layer(3), "k": Affine(layer(4).weight[:2])}
    together = solve_linear(sums.share(both, FEATCAL), anchors, FEATCAL)
    for name in both:
        alone = solve_linear(sums.share({name: both[name]}, FEATCAL), {name: anchors[name]}, FEATCAL)[name]
        torch.testing.assert_close(together[name].weight, alone.weight, rtol=1e-5, atol=1e-6)
    assert together["k"].bias is None and together["q"].bias is not None


def norm_share(zs: Sequence[Tensor], norm: Affine) -> dict[str, Tensor]:
    sums = NormSums()
    for z in zs:
        sums.add(z)
    return sums.share(norm)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_norm_minimises_its_squared_error_in_every_feature(with_bias: bool) -> None:
    """Σₖ mean (z·γ + β − z·γₖ − βₖ)² + λ·(γ − A)² + λ·(β − B)², by least squares in float64."""
    zs = [samples(10), samples(20)]
    norms = [Affine(draw(seed, INPUTS), draw(seed + 50, INPUTS) if with_bias else None) for seed in (1, 2)]
    anchor = Affine(draw(3, INPUTS), draw(53, INPUTS) if with_bias else None)
    rule = Rule(ridge=0.2)
    found = solve_norm(added([norm_share(z, norm) for z, norm in zip(zs, norms, strict=True)]), anchor, rule)
    for d in range(INPUTS):
        rows, values = [[0.2**0.5, 0.0], [0.0, 0.2**0.5]], [0.2**0.5 * float(anchor.weight[d]), 0.0]
        values[1] = 0.2**0.5 * float(anchor.bias[d]) if anchor.bias is not None else 0.0
        for of_expert, norm in zip(zs, norms, strict=True):
            z = flat(of_expert)[:, d]
            bias = float(norm.bias[d]) if norm.bias is not None else 0.0
            rows += [[value / len(z) ** 0.5, (1.0 if with_bias else 0.0) / len(z) ** 0.5] for value in z]
            values += [(value * float(norm.weight[d]) + bias) / len(z) ** 0.5 for value in z]
        expected = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
        assert float(found.weight[d]) == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
        assert found.bias is None or float(found.bias[d]) == pytest.approx(expected[1], rel=1e-4, abs=1e-5)


def test_a_feature_of_a_norm_that_is_always_zero_keeps_the_anchor() -> None:
    z = samples(10)
    for x in z:
        x[..., 0] = 0
    for bias in (None, draw(9, INPUTS)):
        anchor = Affine(draw(3, INPUTS), bias)
        expert = Affine(draw(1, INPUTS), None if bias is None else draw(2, INPUTS))
        found = solve_norm(added([norm_share(z, expert)]), anchor, Rule(ridge=0))
        assert found.weight[0] == anchor.weight[0]
        torch.testing.assert_close(found.weight[1:], expert.weight[1:], rtol=1e-4, atol=1e-5)
