"""The gradient of the coefficients, without any expert in the student, against autograd and finite differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import plan_of
from plain import Plain, task_vectors
from reference import Reference, pieces

from engine.codec import unpack_all
from engine.coefficients import Coefficients, Layout
from engine.errors import RunError
from engine.expert import Target
from engine.student import Student
from engine.task_vectors import LocalShards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("student")
    config = tiny.make_merge(folder / "merge", parameters={"temperature": 1.5, "hidden_weight": 0.7})
    plan = plan_of(config)
    targets = {at: Target.from_tensors(unpack_all(packed)) for at, packed in Plain(plan, folder).targets.items()}
    layout = Layout.make(plan.numels, {name: i % 4 for i, name in enumerate(plan.merged)})
    values = np.random.default_rng(0).uniform(0.1, 0.6, (2, layout.width))
    return config, plan, targets, Coefficients(layout, values)


def loss_at(plan, student: Student, target: Target, coefficients: Coefficients) -> float:
    LocalShards(task_vectors(plan)).merge(coefficients, student.put)
    losses = student.accumulate(target, 1.0, 1.0)
    for name in plan.merged:
        student.take(name)
    return losses.kl + 0.7 * losses.hidden


def gradient(plan, student: Student, target: Target, coefficients: Coefficients) -> np.ndarray:
    shards = LocalShards(task_vectors(plan))
    shards.merge(coefficients, student.put)
    student.accumulate(target, 1.0, 1.0)
    return shards.gradients(coefficients.layout, student.take)


def test_coefficient_gradients_equal_autograd_through_the_composed_weights(setup) -> None:
    config, plan, targets, coefficients = setup
    got = gradient(plan, Student(plan, CPU), targets[1, 2], coefficients)

    reference = Reference(config)
    columns = coefficients.layout.columns
    alpha = {
        n: torch.tensor(coefficients.values[:, c], dtype=torch.float32).requires_grad_() for n, c in columns.items()
    }
    assert all(len(pieces(plan.numels[n], alpha[n].shape[1])) == alpha[n].shape[1] for n in plan.merged)
    reference.loss(alpha, 1, 2).backward()
    for name, column in columns.items():
        expected = alpha[name].grad.numpy()
        np.testing.assert_allclose(got[:, column], expected, rtol=1e-3, atol=1e-5 * np.abs(got).max(), err_msg=name)


def test_coefficient_gradients_equal_finite_differences(setup) -> None:
    _, plan, targets, coefficients = setup
    student, target = Student(plan, CPU), targets[0, 1]
    got = gradient(plan, student, target, coefficients)
    largest = np.argsort(-np.abs(got), axis=None)[:6]
    step = 1e-2
    for k, column in zip(*np.unravel_index(largest, got.shape), strict=True):
        values = {}
        for sign in (-1, 1):
            moved = coefficients.values.copy()
            moved[k, column] += sign * step
            values[sign] = loss_at(plan, student, target, Coefficients(coefficients.layout, moved))
        assert (values[1] - values[-1]) / (2 * step) == pytest.approx(got[k, column], rel=0.02)


def test_gradients_of_a_window_add_up(setup) -> None:
    _, plan, targets, coefficients = setup
    student = Student(plan, CPU)
    shards = LocalShards(task_vectors(plan))
    shards.merge(coefficients, student.put)
    for at in ((0, 0), (1, 0)):
        student.accumulate(targets[at], 2.0, 0.5)
    together = shards.gradients(coefficients.layout, student.take)
    apart = sum(gradient(plan, student, targets[at], coefficients) for at in ((0, 0), (1, 0)))
    np.testing.assert_allclose(together, apart, rtol=1e-3, atol=1e-6)


def test_a_perfect_match_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=1, exclude=["never"])
    plan = plan_of(config)
    target = Target.from_tensors(unpack_all(Plain(plan, tmp_path).targets[0, 0]))
    student = Student(plan, CPU)
    layout = Layout.make(plan.numels, dict.fromkeys(plan.merged, 1))
    LocalShards(task_vectors(plan)).merge(Coefficients.constant(layout, [1.0]), student.put)
    losses = student.accumulate(target, 1.0, 1.0)
    assert losses.kl == pytest.approx(0, abs=1e-6)
    assert losses.hidden == pytest.approx(0, abs=1e-8)


def test_what_is_never_merged_is_never_copied_and_has_no_gradient(setup) -> None:
    _, plan, targets, _ = setup
    student = Student(plan, CPU)
    LocalShards(task_vectors(plan)).merge(
        Coefficients.constant(Layout.make(plan.numels, dict.fromkeys(plan.merged, 1)), [0.1, 0.1]), student.put
    )
    student.accumulate(targets[0, 0], 1.0, 1.0)
    with_gradient = {name for name, p in student.model.named_parameters() if p.grad is not None}
    assert with_gradient == set(plan.merged)
    student.take(plan.merged[0])
    assert student.model.get_parameter(plan.merged[0]).grad is None, "a gradient that is taken is gone"


def test_a_loss_that_is_not_finite_is_an_error(setup) -> None:
    _, plan, targets, _ = setup
    student = Student(plan, CPU)
    for name in plan.merged:
        student.put(name, torch.full(plan.base_header.tensors[name].shape, float("nan")))
    with pytest.raises(RunError, match="not finite"):
        student.accumulate(targets[0, 0], 1.0, 1.0)
