"""Losses against closed forms in float64, and their gradients against finite differences of the closed forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from engine.learning.losses import (
    entropy_loss,
    hidden_loss,
    logit_loss,
    ordered_sum,
    regularization,
    regularization_gradient,
    relative_hidden_loss,
)

Array = npt.NDArray[np.float64]

TEMPERATURES = [0.5, 1.0, 3.0]


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def closed_kl(student_TV: Array, expert_TV: Array, temperature: float) -> float:
    """Return T² · mean over tokens of Σ p · ln(p / q)."""
    p = np.exp(expert_TV / temperature) / np.exp(expert_TV / temperature).sum(axis=1, keepdims=True)
    q = np.exp(student_TV / temperature) / np.exp(student_TV / temperature).sum(axis=1, keepdims=True)
    return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


def closed_entropy(z_TV: Array) -> float:
    """Return −Σ over tokens of Σ p · ln p."""
    p = np.exp(z_TV) / np.exp(z_TV).sum(axis=1, keepdims=True)
    return float(-(p * np.log(p)).sum())


def closed_hidden(student: dict[int, Array], expert: dict[int, Array]) -> float:
    return float(np.mean([((student[i] - expert[i]) ** 2).mean() for i in expert]))


def differences(loss: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Return the gradient of a float64 function by central differences."""
    slopes = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        slopes[place] = (loss(up) - loss(down)) / (2 * step)
    return slopes


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def divergence(student_TV: Tensor, expert_TV: Tensor, temperature: float) -> Tensor:
    """Return T² · Σ over tokens of torch's KL divergence in float64, differentiable by autograd."""
    student, expert = (functional.log_softmax(z.double() / temperature, dim=-1) for z in (student_TV, expert_TV))
    return temperature**2 * functional.kl_div(student, expert, log_target=True, reduction="sum")


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_logit_loss_is_the_closed_form_summed_over_tokens(temperature: float) -> None:
    student, expert = random(5, 7, seed=1), random(5, 7, seed=2)
    found, slope = logit_loss(student, expert, temperature)
    assert found.shape == () and found.dtype == torch.float32
    assert slope.shape == (5, 7) and slope.dtype == torch.float32
    closed = 5 * closed_kl(student.double().numpy(), expert.double().numpy(), temperature)
    assert found.item() == pytest.approx(closed, 1e-5)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 12), st.floats(0.2, 5), st.floats(0.1, 10), st.booleans()
)
def test_the_logit_loss_and_its_gradient_are_those_of_torch_s_kl_divergence(
    seed: int, tokens: int, words: int, temperature: float, scale: float, far: bool
) -> None:
    student = random(tokens, words, seed=seed, scale=scale)
    expert = random(tokens, words, seed=seed + 1, scale=scale) + (50 if far else 0)
    found, slope = logit_loss(student, expert, temperature)
    wanted = divergence(student, expert, temperature).item()
    # The rounding of log-probabilities is proportional to the size of the logits.
    size = float(max(student.abs().max(), expert.abs().max())) / temperature
    assert found.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6 * temperature**2 * tokens * (1 + size))
    autograd = gradient(lambda z: divergence(z, expert, temperature), student)
    torch.testing.assert_close(slope, autograd, rtol=1e-4, atol=2e-6 * temperature * (1 + size))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_logit_loss_is_zero_at_a_perfect_match_and_flat_there(temperature: float) -> None:
    logits = random(4, 9)
    found, slope = logit_loss(logits, logits.clone(), temperature)
    assert found.item() == 0
    assert not slope.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logit_loss_changes_neither_operand_and_records_nothing(dtype: torch.dtype) -> None:
    student, expert = random(5, 7, seed=1).to(dtype).requires_grad_(), random(5, 7, seed=2).to(dtype)
    before = student.detach().clone(), expert.clone()
    # At T = 1 an implementation could skip the division and work on the operands in place.
    found, slope = logit_loss(student, expert, 1.0)
    assert torch.equal(student.detach(), before[0]) and torch.equal(expert, before[1])
    assert not found.requires_grad and not slope.requires_grad
    slope.zero_()
    assert torch.equal(student.detach(), before[0]) and torch.equal(expert, before[1])
    assert student.grad is None


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from(TEMPERATURES))
def test_some_tokens_at_a_time_sum_up_to_the_whole(tokens: int, at_a_time: int, seed: int, temperature: float) -> None:
    student, expert = random(tokens, 9, seed=seed), random(tokens, 9, seed=seed + 1)
    whole, slope = logit_loss(student, expert, temperature)
    parts = [
        logit_loss(student[start : start + at_a_time], expert[start : start + at_a_time], temperature)
        for start in range(0, tokens, at_a_time)
    ]
    torch.testing.assert_close(torch.stack([part for part, _ in parts]).sum(), whole)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), slope, rtol=1e-6, atol=1e-7)


def test_the_logit_loss_does_not_see_a_constant_added_to_a_token_s_logits() -> None:
    student, expert = random(4, 9, seed=1), random(4, 9, seed=2)
    shifted = student + torch.arange(4.0)[:, None]
    for found, wanted in zip(logit_loss(shifted, expert, 1.0), logit_loss(student, expert, 1.0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 12), st.floats(0.2, 5))
def test_the_logit_loss_is_never_negative(seed: int, tokens: int, words: int, temperature: float) -> None:
    student, expert = random(tokens, words, seed=seed), random(tokens, words, seed=seed + 1)
    assert logit_loss(student, expert, temperature)[0].item() >= -1e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_loss_scales_with_the_square_of_the_temperature(temperature: float) -> None:
    student, expert = random(5, 7, seed=1), random(5, 7, seed=2)
    heated, _ = logit_loss(student * temperature, expert * temperature, temperature)
    torch.testing.assert_close(heated, temperature**2 * logit_loss(student, expert, 1.0)[0])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_logit_loss_has_the_gradient_of_the_soft_target_cross_entropy(temperature: float) -> None:
    student, expert = random(5, 7, seed=1), random(5, 7, seed=2)

    def cross_entropy(z: Tensor) -> Tensor:
        soft = functional.softmax(expert / temperature, dim=-1)
        return temperature**2 * functional.cross_entropy(z / temperature, soft)

    _, slope = logit_loss(student, expert, temperature)
    torch.testing.assert_close(slope / 5, gradient(cross_entropy, student), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_logit_loss_has_the_gradient_of_finite_differences(temperature: float) -> None:
    student, expert = random(3, 5, seed=1), random(3, 5, seed=2)
    _, slope = logit_loss(student, expert, temperature)
    wanted = differences(lambda z: closed_kl(z, expert.double().numpy(), temperature), student.double().numpy())
    np.testing.assert_allclose(slope.numpy() / 3, wanted, rtol=1e-4, atol=1e-6)


def test_the_entropy_is_the_closed_form_summed_over_tokens() -> None:
    logits = random(5, 7)
    found, slope = entropy_loss(logits)
    assert found.shape == () and found.dtype == torch.float32
    assert slope.shape == (5, 7) and slope.dtype == torch.float32
    assert found.item() == pytest.approx(closed_entropy(logits.double().numpy()), 1e-6)


def test_the_entropy_by_hand() -> None:
    even, sure = torch.zeros(3, 8), torch.tensor([[200.0, 0.0, 0.0]])
    found, slope = entropy_loss(even)
    assert found.item() == pytest.approx(3 * np.log(8), 1e-6)
    torch.testing.assert_close(slope, torch.zeros(3, 8), rtol=0, atol=1e-6)
    found, slope = entropy_loss(sure)
    assert found.item() == 0 and not slope.any()


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 12), st.floats(0.1, 30), st.booleans())
def test_the_entropy_and_its_gradient_are_those_of_torch_s_distribution(
    seed: int, tokens: int, words: int, scale: float, far: bool
) -> None:
    logits = random(tokens, words, seed=seed, scale=scale) + (50 if far else 0)

    def torch_s(z: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=z.double()).entropy().sum()

    found, slope = entropy_loss(logits)
    # The rounding of the logits bounds the precision of a probability.
    size = 1 + float(logits.abs().max())
    assert found.item() == pytest.approx(torch_s(logits).item(), rel=1e-5, abs=1e-6 * tokens * size)
    torch.testing.assert_close(slope, gradient(torch_s, logits), rtol=1e-4, atol=2e-6 * size)


def test_the_entropy_has_the_gradient_of_finite_differences() -> None:
    logits = random(3, 5)
    wanted = differences(closed_entropy, logits.double().numpy())
    np.testing.assert_allclose(entropy_loss(logits)[1].numpy(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_entropy_changes_no_operand_and_records_nothing(dtype: torch.dtype) -> None:
    logits = random(5, 7).to(dtype).requires_grad_()
    before = logits.detach().clone()
    found, slope = entropy_loss(logits)
    assert not found.requires_grad and not slope.requires_grad
    slope.zero_()
    assert torch.equal(logits.detach(), before) and logits.grad is None


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_the_entropy_of_some_tokens_at_a_time_sums_up_to_the_whole(tokens: int, at_a_time: int, seed: int) -> None:
    logits = random(tokens, 9, seed=seed)
    whole, slope = entropy_loss(logits)
    parts = [entropy_loss(logits[start : start + at_a_time]) for start in range(0, tokens, at_a_time)]
    torch.testing.assert_close(torch.stack([part for part, _ in parts]).sum(), whole)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), slope, rtol=1e-6, atol=1e-7)


def test_a_logit_that_rules_a_word_out_has_no_part_in_the_entropy() -> None:
    logits = random(2, 6)
    wanted, slopes = entropy_loss(logits)
    ruled_out = torch.cat([logits, torch.full((2, 1), -torch.inf)], dim=1)
    found, slope = entropy_loss(ruled_out)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(slope, torch.cat([slopes, torch.zeros(2, 1)], dim=1))


def test_the_entropy_of_logits_that_are_not_finite_is_not_finite() -> None:
    for spoilt in (torch.nan, torch.inf):
        logits = random(2, 6)
        logits[1, 3] = spoilt
        assert not entropy_loss(logits)[0].isfinite()


def test_the_hidden_loss_is_the_closed_form_over_the_expert_s_layers() -> None:
    student = {i: random(4, 6, seed=i) for i in range(5)}
    expert = {3: random(4, 6, seed=13), 0: random(4, 6, seed=10)}
    found = hidden_loss(student, expert)
    assert found.shape == () and found.dtype == torch.float32
    wanted = closed_hidden(*({i: t.double().numpy() for i, t in one.items()} for one in (student, expert)))
    assert found.item() == pytest.approx(wanted, 1e-6)


def test_the_hidden_loss_by_hand() -> None:
    student = {1: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2: torch.zeros(2, 2)}
    expert = {1: torch.tensor([[1.0, 0.0], [0.0, 4.0]]), 2: torch.full((2, 2), 2.0)}
    assert hidden_loss(student, expert).item() == ((0 + 4 + 9 + 0) / 4 + 4) / 2


def test_the_hidden_loss_is_zero_at_a_perfect_match_and_where_no_layer_is_compared() -> None:
    states = {2: random(4, 6)}
    assert hidden_loss(states, {2: states[2].clone()}).item() == 0
    assert gradient(lambda h: hidden_loss({2: h}, states), states[2]).abs().max() == 0
    assert hidden_loss(states, {}).item() == 0


def test_the_hidden_loss_has_the_gradient_of_finite_differences() -> None:
    student, expert = random(3, 4, seed=1), {1: random(3, 4, seed=2), 2: random(3, 4, seed=3)}
    numbers = {i: tensor.double().numpy() for i, tensor in expert.items()}
    found = gradient(lambda h: hidden_loss({1: h, 2: h * h}, expert), student)
    wanted = differences(lambda h: closed_hidden({1: h, 2: h * h}, numbers), student.double().numpy())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, expert = random(5, 64, seed=1).to(dtype), random(5, 64, seed=2).to(dtype)
    for found, wanted in [
        *zip(logit_loss(student, expert, 2.0), logit_loss(student.float(), expert.float(), 2.0), strict=True),
        *zip(entropy_loss(student), entropy_loss(student.float()), strict=True),
        (hidden_loss({0: student}, {0: expert}), hidden_loss({0: student.float()}, {0: expert.float()})),
    ]:
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)
    assert gradient(lambda h: hidden_loss({0: h}, {0: expert}), student).dtype == dtype


def test_regularization_by_hand() -> None:
    alpha, prior = np.array([[0.1, 0.4], [0.5, 0.2]]), np.array([[0.1, 0.1], [0.3, 0.3]])
    assert regularization(alpha, prior) == pytest.approx((0 + 0.3 + 0.2 + 0.1) / 2)
    np.testing.assert_array_equal(regularization_gradient(alpha, prior), [[0, 0.5], [0.5, -0.5]])


def test_regularization_and_its_gradient_are_zero_at_the_prior() -> None:
    prior = np.full((3, 4), 0.3)
    assert regularization(prior.copy(), prior) == 0
    np.testing.assert_array_equal(regularization_gradient(prior.copy(), prior), np.zeros((3, 4)))


def test_regularization_of_nothing_is_zero() -> None:
    nothing = np.zeros((2, 0))
    assert regularization(nothing, nothing) == 0
    assert regularization_gradient(nothing, nothing).shape == (2, 0)


def test_regularization_has_the_gradient_of_finite_differences() -> None:
    generator = np.random.default_rng(0)
    alpha, prior = generator.uniform(0, 1, (3, 5)), generator.uniform(0, 1, (3, 5))
    wanted = differences(lambda table: regularization(table, prior), alpha, step=1e-7)
    np.testing.assert_allclose(regularization_gradient(alpha, prior), wanted, rtol=1e-6, atol=1e-7)


def closed_relative(student: dict[int, Array], expert: dict[int, Array]) -> float:
    return float(
        np.mean([((student[i] - e) ** 2).sum() / ((e - e.mean(axis=0)) ** 2).sum() for i, e in expert.items()])
    )


def test_the_relative_hidden_loss_is_the_closed_form_and_so_is_its_gradient() -> None:
    student, expert = ({i: random(4, 6, seed=seed + i) for i in (1, 3)} for seed in (0, 10))
    in_64 = {i: tensor.double().numpy() for i, tensor in student.items()}
    targets = {i: tensor.double().numpy() for i, tensor in expert.items()}
    assert relative_hidden_loss(student, expert).item() == pytest.approx(closed_relative(in_64, targets), rel=1e-5)
    slope = gradient(lambda at: relative_hidden_loss(student | {3: at}, expert), student[3])
    expected = differences(lambda at: closed_relative(in_64 | {3: at}, targets), in_64[3])
    np.testing.assert_allclose(slope.double().numpy(), expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e4), st.integers(2, 6), st.integers(0, 99))
def test_the_relative_hidden_loss_does_not_depend_on_scale(size: float, tokens: int, seed: int) -> None:
    student, expert = random(tokens, 5, seed=seed), random(tokens, 5, seed=seed + 1)
    plain = relative_hidden_loss({0: student}, {0: expert}).item()
    assert relative_hidden_loss({0: size * student}, {0: size * expert}).item() == pytest.approx(plain, rel=1e-3)
    mean = expert.mean(dim=0).expand(tokens, -1)
    assert relative_hidden_loss({0: mean}, {0: expert}).item() == pytest.approx(1.0, rel=1e-4)
    assert relative_hidden_loss({0: expert}, {0: expert}).item() == 0.0


def test_the_relative_hidden_loss_of_one_token_or_of_no_layer_is_finite() -> None:
    one, other = random(1, 5), random(1, 5, seed=1)
    expected = float((one - other).square().sum() / other.square().sum())
    assert relative_hidden_loss({0: one}, {0: other}).item() == pytest.approx(expected, rel=1e-6)
    assert relative_hidden_loss({0: one[:0]}, {0: other[:0]}).item() == 0.0
    assert relative_hidden_loss({}, {}).item() == 0.0


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(0, 99))
def test_an_ordered_sum_is_the_sum_and_so_is_its_gradient(count: int, seed: int) -> None:
    values = random(count, 3, seed=seed).requires_grad_()
    found = ordered_sum(values)
    torch.testing.assert_close(found, values.sum(dim=0), rtol=1e-6, atol=1e-5)
    found.sum().backward()
    assert values.grad is not None and bool((values.grad == 1).all())


def test_an_ordered_sum_adds_halves() -> None:
    """In float32 1 + 2⁻²⁴ rounds to 1, and 1 + 2 · 2⁻²⁴ does not."""
    small = 2.0**-24
    assert ordered_sum(torch.tensor([1.0, small, small, small])).item() == 1 + 2 * small
    assert ordered_sum(torch.tensor([small, 1.0, 0.0, small])).item() == 1
    assert ordered_sum(torch.tensor([1.0, 0.0, small])).item() == 1
    assert torch.equal(ordered_sum(torch.empty(0, 3)), torch.zeros(3))


@pytest.mark.parametrize("tokens", [1, 301])
def test_the_losses_do_not_depend_on_the_number_of_threads(tokens: int) -> None:
    """torch splits a sum of more than 2¹⁵ elements among its threads."""
    width = 40_000 if tokens == 1 else 257
    student, expert = random(tokens, width, seed=1), random(tokens, width, seed=2)

    def bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        at = student.clone().requires_grad_()
        hidden = [loss({1: at, 2: 2 * at}, {1: expert, 2: expert}) for loss in (hidden_loss, relative_hidden_loss)]
        torch.stack(hidden).sum().backward()
        assert at.grad is not None
        return [*hidden, at.grad, *logit_loss(student, expert, 2.0), *entropy_loss(student)]

    before = torch.get_num_threads()
    try:
        first, *others = [bits(threads) for threads in (1, 2, 3, 4)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
