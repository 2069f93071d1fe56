"""bfloat16 weights: the coefficient gradient of a window against one computed in float64.

Computed in float32: the differences τ and their products with the weight gradient (bfloat16 sums that cancel would keep
two digits), the losses, and the gradient of the logits (a softmax over a vocabulary). Sums over blocks, pieces and
samples are in float64. The forward and backward pass, and the weight gradient summed over a window, are in bfloat16,
the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import plan_of
from plain import Plain
from thorough import as_thorough
from torch.nn import functional
from transformers import AutoModelForCausalLM

from actors.trainer import WindowSample
from engine.codec import unpack_all
from engine.learning.learner import Learner, first_stage
from engine.learning.targets import Target
from engine.planning.open_models import open_base, open_expert
from engine.task_vectors.experts import FullExpert

K, TOKENS = 8, 200


@pytest.fixture
def gradient(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Return a list that receives ∂L/∂α [K, C] of every call of `Learner.step`."""
    seen: list[np.ndarray] = []
    step = Learner.step

    def watched(self: Learner, gradient: np.ndarray) -> object:
        seen.append(gradient.copy())
        return step(self, gradient)

    monkeypatch.setattr(Learner, "step", watched)
    return seen


@pytest.mark.parametrize("gradients", ["accumulate", as_thorough("stream")])
def test_bfloat16_coefficient_gradients_agree_with_float64_ones_within_a_percent(
    make_merge: Callable[..., Path], tmp_path: Path, gradient: list[np.ndarray], gradients: str
) -> None:
    parameters = {"gradient_accumulation": K}
    config = make_merge(experts=K, samples=(1,) * K, dtype=torch.bfloat16, gradients=gradients, parameters=parameters)
    for k in range(K):
        # As long as a short chat, so that the bfloat16 rounding of single tokens averages out.
        tiny.write_calibration(config.parent / f"expert{k}.jsonl", 1, seed=k, length=TOKENS)
    weights = [f"models.{k}.parameters.weight=0.1" for k in range(K)]
    merge = Plain(plan_of(config, *weights), tmp_path)
    window = [WindowSample(merge.samples[k][0], merge.targets[k, 0]) for k in range(K)]
    merge.trainer.step(first_stage(merge.plan), None, 0, window)
    offline = float64_gradient(merge, window)
    assert np.linalg.norm(gradient[0] - offline) < 0.01 * np.linalg.norm(offline)


def test_a_float16_base_learns_from_gradients_that_are_zero_in_float16(
    make_merge: Callable[..., Path], tmp_path: Path, gradient: list[np.ndarray]
) -> None:
    """A small loss weight stands for the small gradients of a large model."""
    config = make_merge(dtype=torch.float16, parameters={"weight": 0.3, "loss_weight": 1e-6})
    for dtype in ("float32", "float16", None):
        merge = Plain(plan_of(config, *([f"dtype={dtype}"] if dtype else [])), tmp_path / str(dtype))
        window = [WindowSample(merge.samples[k][0], merge.targets[k, 0]) for k in range(2)]
        merge.trainer.step(first_stage(merge.plan), None, 0, window)
    exact, float16, default = gradient
    assert np.linalg.norm(default - exact) < 0.05 * np.linalg.norm(exact)
    assert np.linalg.norm(float16 - exact) > 0.2 * np.linalg.norm(exact), "the case is not one of underflow"


def float64_gradient(merge: Plain, window: list[WindowSample]) -> np.ndarray:
    """Return ∂L/∂α of the same weights and targets in float64, by autograd through the model."""
    plan, base = merge.plan, open_base(merge.plan)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float64).eval()
    named = dict(model.named_parameters())
    taus = {}
    for name in plan.merged:
        start = base.read(name).double()
        experts = [open_expert(expert) for expert in plan.experts]
        assert all(isinstance(expert, FullExpert) for expert in experts)
        taus[name] = torch.stack([expert.checkpoint.read(name).double() - start for expert in experts])
        prior = torch.tensor([expert.weight for expert in plan.experts], dtype=torch.float64)
        merged = start + torch.tensordot(prior, taus[name], 1)
        # Rounded as in the trainer, since the gradient is one at the rounded weights.
        named[name].data = merged.to(torch.bfloat16).double()
    for sample in window:
        target = Target.from_tensors(unpack_all(sample.target))
        output = model(input_ids=target.input_ids_T[None], output_hidden_states=True)
        assert target.last_hidden_CH is not None
        with torch.no_grad():
            logits = model.get_output_embeddings()(target.last_hidden_CH.double())
        ours, theirs = (functional.log_softmax(z, -1) for z in (output.logits[0], logits))
        kl = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        hidden = [(output.hidden_states[i][0] - h.double()).square().mean() for i, h in target.hidden_CH.items()]
        ((kl + torch.stack(hidden).mean()) / len(window)).backward()
    columns = [(taus[name] * named[name].grad).flatten(1).sum(1) for name in plan.merged]
    return torch.stack(columns, 1).numpy()
