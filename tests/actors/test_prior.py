"""The search for a prior on the calibration samples, and the losses that the trainer measures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import plan_of
from errors import refused
from plain import Plain
from transformers import AutoModelForCausalLM

from actors.trainer import Trainer, WindowSample
from engine.errors import ConfigError
from engine.learning.learner import PRIORS, best_prior, common_prior, first_stage
from engine.task_vectors.coefficients import Coefficients

AUTO = "parameters.weight=auto"
OWN = [f"models.{k}.parameters.weight=null" for k in range(2)]


def test_measured_losses_are_those_of_a_step(llama_merge: Path, tmp_path: Path) -> None:
    plain = Plain(plan_of(llama_merge, "models.0.parameters.loss_weight=0.5"), tmp_path)
    window = [WindowSample(plain.samples[k][0], plain.targets[k, 0]) for k in range(2)]
    step = plain.trainer.step(first_stage(plain.plan), None, 0, window)
    found = plain.trainer.measure(common_prior(plain.plan, 0.5), window)
    for row, losses in zip(step.rows, found, strict=True):
        assert (losses.kl, losses.hidden) == pytest.approx((row["kl"], row["hidden"]), rel=1e-5)
    assert plain.trainer.step(first_stage(plain.plan), None, 0, window).rows[0]["kl"] == step.rows[0]["kl"]


@pytest.mark.parametrize("rows", [3, 1000])
def test_measured_certainties_are_those_of_base_and_expert(llama_merge: Path, tmp_path: Path, rows: int) -> None:
    plan = plan_of(llama_merge)
    plain = Plain(plan, tmp_path)
    trainer = Trainer(plan, plain.shards, lambda target: target, logit_bytes=rows * 4 * tiny.VOCAB)
    window = [WindowSample(plain.samples[k][0], plain.targets[k, 0]) for k in range(2)]
    nothing = Coefficients.constant(first_stage(plan).layout, [0.0, 0.0])
    for item, losses in zip(window, trainer.measure(nothing, window, certain=True), strict=True):
        wanted = []
        for name in ("base", f"expert{item.sample.expert}"):
            model = AutoModelForCausalLM.from_pretrained(llama_merge.parent / name)
            with torch.no_grad():
                p = model(torch.tensor([item.sample.input_ids])).logits[0].double().softmax(-1)
            wanted.append(1 - float(-(p * p.log()).sum(-1).mean()) / np.log(tiny.VOCAB))
        assert losses.certainties == pytest.approx(wanted, abs=1e-5) and wanted[0] != pytest.approx(wanted[1], abs=1e-3)
    assert all(losses.certainties is None for losses in trainer.measure(nothing, window))


def test_the_best_prior_is_that_of_the_weighted_losses() -> None:
    losses_WN2 = np.ones((len(PRIORS), 2, 2))
    losses_WN2[3, 0, 0], losses_WN2[5, 1, 1] = 0.5, 0.2
    assert best_prior(losses_WN2, np.array([1.0, 1.0]), 1.0) == PRIORS[5]
    assert best_prior(losses_WN2, np.array([1.0, 1.0]), 0.5) == PRIORS[3]
    assert best_prior(losses_WN2, np.array([1.0, 0.1]), 1.0) == PRIORS[3]


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
