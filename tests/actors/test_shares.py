"""Several trainers as plain classes: the same bits for any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from conftest import plan_of
from errors import refused
from plain import Plain

from actors.trainer import WindowSample
from engine.errors import RunError
from engine.learning.learner import first_stage
from engine.planning.schedule import deal, passes, training_order

# Passes of two samples, three in the first window and one in the last.
WINDOWS = ("parameters.gradient_accumulation=5", "parameters.epochs=2", "batch_tokens=22")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny.make_merge(tmp_path / "merge", parameters={"budget": 1.5})


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("gradients=stream", "parameters.task_vectors=orthogonal"), id="factors"),
        pytest.param(
            ("gradients=stream", "parameters.task_vectors=orthogonal", "parameters.chunks=spectral"),
            id="directions",
            marks=pytest.mark.thorough,
        ),
        pytest.param(("gradients=stream",), id="dense", marks=pytest.mark.thorough),
    ],
)
def test_any_number_of_trainers_learns_the_same_bits(config: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    plan = plan_of(config, *WINDOWS, *options)
    factors = "always" if len(options) > 1 else "never"
    plain = Plain(plan, tmp_path, factors)
    order = [plain.samples[k][i].tokens for k, i in training_order([4, 3], 2)]
    together = [passes(order[start : start + 5], 22) for start in range(0, 16, 5)]
    assert [len(some) for some in together] == [3, 3, 3, 1]
    assert any(order[a] != order[b] for a, b in together[0][:2]), "with padding"
    expected, rows = plain.run(), plain.rows
    for trainers in (2, 3, 4):
        plain.start(trainers)
        assert all(first.same_as(second) for first, second in zip(plain.run(), expected, strict=True))
        assert [row | {"seconds": 0} for row in plain.rows] == [row | {"seconds": 0} for row in rows]


def test_without_stream_the_first_trainer_computes_the_gradient(config: Path, tmp_path: Path) -> None:
    plan = plan_of(config)
    plain = Plain(plan, tmp_path)
    window = [WindowSample(plain.samples[k][0], plain.targets[k, 0]) for k in range(2)]
    stage = first_stage(plan)
    shares = [plain.trainer.share(stage, None, window, index, 2) for index in range(2)]
    assert [len(share.gradients) for share in shares] == [1, 0]
    alone, beside = (plain.trainer.step(stage, None, 0, window, others=others).state for others in ([], shares[1:]))
    assert all(alone[name].equal(beside[name]) for name in alone)


def test_a_loss_that_is_not_finite_is_an_error_of_any_trainer(config: Path, tmp_path: Path) -> None:
    plain = Plain(plan_of(config, "gradients=stream", "batch_tokens=1"), tmp_path)
    plain.start(trainers=2)
    (other,) = plain.others
    window = [WindowSample(plain.samples[k][0], plain.targets[k, 0]) for k in range(2)]
    other.load()
    for tensor in other._student.model.state_dict().values():
        tensor.fill_(float("inf"))
    with refused(RunError, facts=["not finite"]):
        other.share(first_stage(plain.plan), None, window, 1, 2)


@pytest.mark.parametrize(("costs", "count"), [([5, 9, 1, 7], 1), ([5, 9, 1, 7, 2, 2, 8], 3), ([4, 4], 4), ([], 2)])
def test_items_are_dealt_once_in_nearly_equal_shares(costs: list[float], count: int) -> None:
    dealt = deal(costs, count)
    assert len(dealt) == count and sorted(index for some in dealt for index in some) == list(range(len(costs)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    loads = [sum(costs[index] for index in some) for some in dealt]
    assert max(loads) - min(loads) <= max(costs, default=0)
