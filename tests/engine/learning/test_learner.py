"""The learner against a plain torch loop, its schedule against a closed form, and resuming from its state."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from conftest import plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.learning.learner import (
    Learner,
    Stage,
    StepMetrics,
    common_prior,
    first_stage,
    needs_prior,
    second_stage,
    with_prior,
)
from engine.methods.learned import Parameters
from engine.task_vectors.coefficients import ChunkLayout, Coefficients

Array = npt.NDArray[np.float64]

NUMELS = {"a": 10, "b": 7, "c": 9}
WEIGHTS = (0.2, 0.45)
CUT = ChunkLayout.make(NUMELS, {"a": 2, "b": 0, "c": 3})


def plan(weights: tuple[float, ...] = WEIGHTS, merge_method: str = "expert_merging", **parameters: Any) -> Any:
    return SimpleNamespace(
        numels=NUMELS,
        merged=tuple(NUMELS),
        priors=list(weights),
        config=SimpleNamespace(merge_method=merge_method, parameters=Parameters(**parameters)),
    )


def partly_fixed() -> Stage:
    """Return a stage with two learned tensors, which start away from the prior, and a fixed one."""
    generator = np.random.default_rng(1)
    start, fixed = generator.uniform(0.1, 0.9, (2, CUT.width)), generator.uniform(0.1, 0.9, (2, CUT.width))
    return Stage(2, CUT, np.array(WEIGHTS), start, fixed)


def tied() -> Stage:
    """Return a stage with one coefficient per expert and a fixed tensor."""
    start, fixed = np.repeat([[0.3], [0.6]], CUT.width, axis=1), np.full((2, CUT.width), 0.7)
    return Stage(1, CUT, np.array(WEIGHTS), start, fixed, tied=True)


def gradients(steps: int, width: int, seed: int = 0) -> list[Array]:
    return list(np.random.default_rng(seed).normal(0, 1, (steps, len(WEIGHTS), width)))


def plain_loop(
    stage: Stage, parameters: Parameters, slopes: list[Array]
) -> tuple[list[torch.Tensor], list[StepMetrics]]:
    """Return the coefficients and metrics after each step of the method, written with torch alone."""
    learned = torch.from_numpy(stage.layout.learned_columns)
    width = 1 if stage.tied else int(learned.sum())
    prior = torch.from_numpy(np.array(stage.prior))[:, None].expand(-1, width)
    a = torch.nn.Parameter(torch.logit(torch.from_numpy(stage.start)[:, learned][:, :width]))
    optimizer = torch.optim.AdamW(
        [a], lr=parameters.learning_rate, betas=(0.9, 0.999), weight_decay=parameters.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=50, T_mult=2, eta_min=0.1 * parameters.learning_rate
    )
    alphas, metrics = [], []
    for slope in slopes:
        optimizer.zero_grad()
        alpha = torch.sigmoid(a)
        # The start differs from the prior by rounding here, where |·| must have no gradient.
        away = (alpha - prior) * ((alpha - prior).abs() > 1e-12)
        pull = away.abs().sum() / width
        loss = (alpha * torch.from_numpy(slope)[:, learned]).sum() + parameters.regularization * pull
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([a], parameters.max_grad_norm)
        metrics.append(StepMetrics(pull.item(), norm.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        alphas.append(torch.sigmoid(a.detach()).expand(-1, int(learned.sum())))
    return alphas, metrics


def closed_rate(step: int, rate: float) -> float:
    """Return cosine annealing to a tenth of the rate, with restarts after 50 steps and after 100 more."""
    period, since = (50, step) if step < 50 else (100, step - 50) if step < 150 else (200, step - 150)
    return 0.1 * rate + (rate - 0.1 * rate) * (1 + math.cos(math.pi * since / period)) / 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regularization": 0.0},
        {"learning_rate": 0.05, "weight_decay": 0.3},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 1e9, "regularization": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "stage",
    [first_stage(plan()), partly_fixed(), first_stage(plan(merge_method="adamerging", granularity="task")), tied()],
    ids=["first", "partly-fixed", "first-tied", "tied-partly-fixed"],
)
def test_steps_are_those_of_a_plain_torch_loop(stage: Stage, options: dict[str, float]) -> None:
    parameters = Parameters(**options)  # type: ignore[arg-type]
    slopes = gradients(60, stage.layout.width)
    alphas, metrics = plain_loop(stage, parameters, slopes)
    learner, learned = Learner(parameters, stage), stage.layout.learned_columns
    for slope, alpha, wanted in zip(slopes, alphas, metrics, strict=True):
        found = learner.step(slope)
        assert found.regularization == pytest.approx(wanted.regularization, rel=1e-6, abs=1e-12)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)
        assert found.learning_rate == pytest.approx(wanted.learning_rate, rel=1e-12)
        np.testing.assert_allclose(learner.coefficients.values[:, learned], alpha.numpy(), rtol=1e-6)


def test_the_first_step_by_hand() -> None:
    """AdamW's first step is the learning rate times the sign of the gradient, plus the decay of a."""
    parameters = Parameters(learning_rate=0.25, weight_decay=0.1, regularization=5.0)
    learner = Learner(parameters, first_stage(plan()))
    slope = np.array([[1.0, -2.0, 3.0], [-0.5, 0.25, 1.0]])
    metrics = learner.step(slope)
    prior = np.array(WEIGHTS)[:, None]
    a = np.log(prior / (1 - prior))
    moved = a * (1 - 0.25 * 0.1) - 0.25 * np.sign(slope)
    np.testing.assert_allclose(learner.coefficients.values, 1 / (1 + np.exp(-moved)), rtol=1e-6)
    assert metrics.grad_norm == pytest.approx(np.linalg.norm(prior * (1 - prior) * slope))
    assert metrics.regularization == 0 and metrics.learning_rate == 0.25


def test_learning_starts_at_the_coefficients_of_the_stage() -> None:
    stage = partly_fixed()
    values = Learner(Parameters(), stage).coefficients.values
    learned = CUT.learned_columns
    np.testing.assert_allclose(values[:, learned], stage.start[:, learned], rtol=1e-14)
    np.testing.assert_array_equal(values[:, ~learned], stage.fixed[:, ~learned])


def test_the_learning_rate_follows_its_closed_form_through_two_restarts() -> None:
    learner = Learner(Parameters(learning_rate=0.3), first_stage(plan()))
    rates = [learner.step(slope).learning_rate for slope in gradients(160, 3)]
    assert rates == pytest.approx([closed_rate(step, 0.3) for step in range(160)], rel=1e-12)
    assert [step for step, rate in enumerate(rates) if rate == pytest.approx(0.3, rel=1e-12)] == [0, 50, 150]


@pytest.mark.parametrize("stage", [partly_fixed(), tied()], ids=["each-column", "tied"])
@pytest.mark.parametrize("stop", [1, 7, 49, 50, 51])
def test_a_restored_learner_resumes_bit_for_bit(stop: int, stage: Stage) -> None:
    slopes = gradients(60, CUT.width)
    whole, first = Learner(Parameters(), stage), Learner(Parameters(), stage)
    for slope in slopes[:stop]:
        whole.step(slope)
        first.step(slope)
    file = safetensors.torch.save(first.state())
    assert len(file) < 20_000
    second = Learner(Parameters(), stage)
    second.restore(safetensors.torch.load(file))
    assert second.coefficients.same_as(whole.coefficients)
    for slope in slopes[stop:]:
        assert second.step(slope) == whole.step(slope)
        assert second.coefficients.same_as(whole.coefficients)


def taken() -> dict[str, Tensor]:
    learner = Learner(Parameters(), partly_fixed())
    learner.step(gradients(1, CUT.width)[0])
    return learner.state()


@pytest.mark.parametrize(
    "changes",
    [
        {"a": None},
        {"exp_avg": None},
        {"more": torch.ones(1)},
        {"a": torch.zeros(1, 1, dtype=torch.float64)},
        {"a": taken()["a"].float()},
        {"a": taken()["a"] * math.nan},
        {"exp_avg_sq": taken()["a"] * math.inf},
        {"schedule": torch.zeros(3, dtype=torch.float64)},
        {"schedule": torch.tensor([0.1, 1.5, 50, 1], dtype=torch.float64)},
        {"schedule": torch.tensor([0.1, 50, 50, 1], dtype=torch.float64)},
        {"schedule": torch.tensor([0.1, 0, 0, 1], dtype=torch.float64)},
        {"schedule": torch.tensor([-0.1, 1, 50, 1], dtype=torch.float64)},
    ],
)
def test_tensors_that_are_no_state_of_the_stage_are_refused(changes: dict[str, Tensor | None]) -> None:
    state = {name: tensor for name, tensor in (taken() | changes).items() if tensor is not None}
    learner = Learner(Parameters(), partly_fixed())
    before = learner.coefficients
    with pytest.raises(ValueError):  # noqa: PT011 - its text is shown as it is
        learner.restore(state)
    assert learner.coefficients.same_as(before)


def test_a_state_is_a_snapshot_that_later_steps_leave_alone() -> None:
    """Repeating a step from the same state must give the same result."""
    stage, slopes = partly_fixed(), gradients(4, CUT.width)
    learner = Learner(Parameters(), stage)
    learner.step(slopes[0])
    state = learner.state()
    learner.step(slopes[1])
    answers = []
    for _ in range(2):
        again = Learner(Parameters(), stage)
        again.restore(state)
        again.step(slopes[1])
        answers.append(again.coefficients)
    assert answers[0].same_as(learner.coefficients)
    assert answers[1].same_as(answers[0])


def test_fixed_columns_never_move_and_their_gradients_are_ignored() -> None:
    stage = partly_fixed()
    learner, other = Learner(Parameters(), stage), Learner(Parameters(), stage)
    fixed = ~CUT.learned_columns
    for slope in gradients(20, CUT.width):
        spoiled = slope.copy()
        spoiled[:, fixed] = math.nan
        assert learner.step(slope) == other.step(spoiled)
        np.testing.assert_array_equal(learner.coefficients.values[:, fixed], stage.fixed[:, fixed])
    assert learner.coefficients.same_as(other.coefficients)
    assert (learner.coefficients.values[:, ~fixed] != stage.start[:, ~fixed]).all()


def test_tied_columns_move_together_by_the_sum_of_their_gradients() -> None:
    parameters = Parameters(max_grad_norm=1e9, regularization=0.5)
    stage, learned = tied(), CUT.learned_columns
    learner = Learner(parameters, stage)
    assert learner.state()["a"].shape == (2, 1)
    start = learner.coefficients
    assert start.values.shape == (2, CUT.width)
    np.testing.assert_allclose(start.values[:, learned], stage.start[:, learned], rtol=1e-14)
    np.testing.assert_array_equal(start.values[:, ~learned], stage.fixed[:, ~learned])
    (slope,) = gradients(1, CUT.width)
    metrics = learner.step(slope)
    alpha, prior = np.array([0.3, 0.6]), np.array(WEIGHTS)
    wanted = alpha * (1 - alpha) * (slope[:, learned].sum(axis=1) + 0.5 * np.sign(alpha - prior))
    assert metrics.grad_norm == pytest.approx(np.linalg.norm(wanted))
    assert metrics.regularization == pytest.approx(np.abs(alpha - prior).sum()), "C is 1"
    moved = learner.coefficients.values[:, learned]
    assert (moved == moved[:, :1]).all() and (np.sign(moved[:, 0] - alpha) == -np.sign(wanted)).all()
    np.testing.assert_array_equal(learner.coefficients.values[:, ~learned], stage.fixed[:, ~learned])


def test_tied_columns_do_not_see_how_a_gradient_is_spread_over_them() -> None:
    stage, learned = tied(), CUT.learned_columns
    gathered, spread = Learner(Parameters(), stage), Learner(Parameters(), stage)
    first = np.flatnonzero(learned)[0]
    for slope in gradients(5, CUT.width):
        sums = np.zeros_like(slope)
        sums[:, first] = slope[:, learned].sum(axis=1)
        gathered.step(sums)
        spread.step(slope)
        np.testing.assert_allclose(gathered.coefficients.values, spread.coefficients.values, rtol=1e-12)


def test_the_stage_itself_is_not_written_to() -> None:
    stage = partly_fixed()
    start, fixed = stage.start.copy(), stage.fixed.copy()
    learner = Learner(Parameters(), stage)
    for slope in gradients(3, CUT.width):
        learner.step(slope)
        learner.coefficients.values.fill(0)
    np.testing.assert_array_equal(stage.start, start)
    np.testing.assert_array_equal(stage.fixed, fixed)
    assert (learner.coefficients.values > 0).all()


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=9).map(tuple),
    chunks=st.tuples(st.integers(1, 10), st.integers(0, 7), st.integers(0, 9)),
)
def test_the_regularisation_does_not_pull_at_the_prior(weights: tuple[float, ...], chunks: tuple[int, ...]) -> None:
    layout = ChunkLayout.make(NUMELS, dict(zip(NUMELS, chunks, strict=True)))
    prior = Coefficients.constant(layout, list(weights)).values
    for tied in (False, True):
        stage = Stage(2, layout, np.array(weights), prior, prior, tied)
        metrics = Learner(Parameters(regularization=1e6), stage).step(np.zeros((len(weights), layout.width)))
        assert metrics.regularization == 0
        assert metrics.grad_norm == 0


def test_the_regularisation_pulls_back_to_the_prior() -> None:
    stage = first_stage(plan())
    learner, width = Learner(Parameters(regularization=5.0, learning_rate=0.05), stage), stage.layout.width
    learner.step(np.full((2, width), -1.0))
    away = learner.coefficients.values
    assert (away > stage.start).all()
    for _ in range(3):
        learner.step(np.zeros((2, width)))
    metrics = learner.step(np.zeros((2, width)))
    assert metrics.regularization > 0 and metrics.grad_norm > 0
    for _ in range(10):
        learner.step(np.zeros((2, width)))
    assert (np.abs(learner.coefficients.values - stage.start) < np.abs(away - stage.start)).all()


def test_a_common_prior_fills_in_for_every_expert_without_one(llama_merge: Path) -> None:
    made = plan_of(
        llama_merge, "parameters.weight=auto", "models.0.parameters.weight=null", "models.1.parameters.weight=0.25"
    )
    assert needs_prior(made)
    filled = with_prior(made, 0.7)
    assert not needs_prior(filled) and filled.priors == [0.7, 0.25]
    table = common_prior(made, 0.7)
    assert (table.values == np.array([[0.7], [0.25]])).all() and table.layout == first_stage(filled).layout
    with pytest.raises(AssertionError):
        _ = made.priors


def test_coefficients_stay_between_zero_and_one() -> None:
    learner = Learner(Parameters(regularization=0.0), first_stage(plan()))
    for _ in range(100):
        learner.step(np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]))
    values = learner.coefficients.values
    assert ((values > 0) & (values < 1)).all()


def test_the_first_stage_has_one_coefficient_a_tensor_at_the_prior() -> None:
    stage = first_stage(plan())
    assert stage.number == 1
    assert stage.layout == ChunkLayout.make(NUMELS, {"a": 1, "b": 1, "c": 1})
    np.testing.assert_array_equal(stage.prior, WEIGHTS)
    np.testing.assert_array_equal(stage.start, [[0.2] * 3, [0.45] * 3])


def test_the_first_stage_starts_where_it_is_told() -> None:
    stage = first_stage(plan(), {"b": [0.7, 0.02]})
    np.testing.assert_array_equal(stage.start, [[0.2, 0.7, 0.2], [0.45, 0.02, 0.45]])
    np.testing.assert_array_equal(stage.prior, WEIGHTS)
    learner = Learner(Parameters(), stage)
    np.testing.assert_allclose(learner.coefficients.values, stage.start, rtol=1e-12)


@pytest.mark.parametrize("merge_method", ["expert_merging", "expert_merging_pp", "adamerging"])
@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_coefficients_are_tied_only_by_adamerging_task_by_task(merge_method: str, granularity: str) -> None:
    found = first_stage(plan(merge_method=merge_method, granularity=granularity))
    assert found.tied == (merge_method == "adamerging" and granularity == "task")
    assert found.layout == first_stage(plan()).layout
    np.testing.assert_array_equal(found.start, [[0.2] * 3, [0.45] * 3])


@pytest.mark.parametrize("start", ["prior", "stage1"])
@pytest.mark.parametrize("fixed", ["prior", "stage1"])
def test_the_second_stage_starts_and_stays_where_the_options_say(start: str, fixed: str) -> None:
    first = Coefficients(first_stage(plan()).layout, np.array([[0.11, 0.12, 0.13], [0.21, 0.22, 0.23]]))
    tables = {
        "prior": np.array([[0.2] * 6, [0.45] * 6]),
        "stage1": np.array([[0.11, 0.11, 0.12, 0.13, 0.13, 0.13], [0.21, 0.21, 0.22, 0.23, 0.23, 0.23]]),
    }
    stage = second_stage(plan(start=start, fixed=fixed), CUT, first)
    assert stage.number == 2 and stage.layout == CUT
    np.testing.assert_array_equal(stage.prior, WEIGHTS)
    values, learned = Learner(Parameters(), stage).coefficients.values, CUT.learned_columns
    np.testing.assert_allclose(values[:, learned], tables[start][:, learned], rtol=1e-14)
    np.testing.assert_array_equal(values[:, ~learned], tables[fixed][:, ~learned])
