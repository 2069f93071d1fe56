"""The search for a prior on the calibration samples, and the losses that the trainer measures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import plan_of
from errors import refused
from plain import Plain

from actors.trainer import WindowSample
from engine.errors import ConfigError
from engine.learning.learner import PRIORS, common_prior, first_stage

AUTO = "parameters.weight=auto"
OWN = [f"models.{k}.parameters.weight=null" for k in range(2)]


def test_measured_losses_are_those_of_a_step(llama_merge: Path, tmp_path: Path) -> None:
    plain = Plain(plan_of(llama_merge, "models.0.parameters.loss_weight=0.5"), tmp_path)
    window = [WindowSample(plain.samples[k][0], plain.targets[k, 0]) for k in range(2)]
    step = plain.trainer.step(first_stage(plain.plan), None, 0, window)
    wanted = sum(share * (row["kl"] + row["hidden"]) for share, row in zip((0.5, 1.0), step.rows, strict=True))
    found = plain.trainer.measure(common_prior(plain.plan, 0.5), window)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert plain.trainer.step(first_stage(plain.plan), None, 0, window).rows[0]["kl"] == step.rows[0]["kl"]


@pytest.mark.parametrize("hidden_loss", ["mse", "relative"])
def test_the_prior_is_the_common_weight_of_the_smallest_loss(
    llama_merge: Path, tmp_path: Path, hidden_loss: str
) -> None:
    plan = plan_of(llama_merge, AUTO, *OWN, f"parameters.hidden_loss={hidden_loss}")
    plain = Plain(plan, tmp_path)
    losses = plain.find_prior()
    assert len(set(losses)) == len(PRIORS)
    assert plain.plan.priors == [PRIORS[int(np.argmin(losses))]] * 2
    plain.learn(first_stage(plain.plan))
    seen = [row for row in plain.rows if row["step"] == 0]
    assert all(np.isfinite(row["kl"]) and np.isfinite(row["hidden"]) for row in seen)  # type: ignore[arg-type]


def test_an_expert_that_has_a_prior_of_its_own_keeps_it(llama_merge: Path, tmp_path: Path) -> None:
    plain = Plain(plan_of(llama_merge, AUTO, OWN[0], "models.1.parameters.weight=0.25"), tmp_path)
    plain.find_prior()
    assert plain.plan.priors[0] in PRIORS and plain.plan.priors[1] == 0.25


def test_adamerging_refuses_an_automatic_prior(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", merge_method="adamerging")
    with refused(ConfigError, facts=["adamerging", "prior", "`weight`"]):
        plan_of(config, AUTO, *OWN)
