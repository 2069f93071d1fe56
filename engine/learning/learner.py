"""Stages of learning, and the optimiser steps on the coefficients of a stage.

Source: Expert Merging, arXiv 2509.25712; the optimiser and its defaults are those of its published command line. Tied
coefficients are those of task-wise AdaMerging, arXiv 2310.02575.
Letters in array names: K experts, C learned coefficients of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from engine.learning.losses import regularization, regularization_gradient
from engine.methods.learned import Parameters
from engine.planning.plan import Plan
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients, logit, sigmoid

# Cosine annealing with warm restarts: the first period, its growth, and the floor as a fraction of the learning rate.
PERIOD, GROWTH, FLOOR = 50, 2, 0.1
# Names of AdamW's own tensors in a state; they exist from the first step on.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# The tensors of a learner by name.
LearnerState = dict[str, Tensor]
# Candidates for the common prior of `weight: auto`.
PRIORS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))


@dataclass(frozen=True)
class Stage:
    """One stage of learning: its chunks and their initial coefficients. All arrays are float64.

    Attributes:
        number: 1 or 2.
        layout: The chunks, and which of them are learned.
        prior: ᾱₖ [K].
        start: Initial values of the learned columns, [K, layout.width].
        fixed: Values of the fixed columns, [K, layout.width].
        tied: Whether all learned columns of an expert are one coefficient (C is 1). They start from the same value.
    """

    number: int
    layout: ChunkLayout
    prior: Array
    start: Array
    fixed: Array
    tied: bool = False


def with_prior(plan: Plan, weight: float) -> Plan:
    """Return the plan with this prior for every expert that has none of its own (`weight: auto`)."""
    return with_priors(plan, [weight] * len(plan.experts))


def needs_prior(plan: Plan) -> bool:
    """Return whether an expert has no prior yet (`weight: auto`)."""
    return any(expert.weight is None for expert in plan.experts)


def with_priors(plan: Plan, weights: Sequence[float]) -> Plan:
    """Return the plan with these priors for the experts that have none of their own."""
    pairs = zip(plan.experts, weights, strict=True)
    return replace(plan, experts=tuple(replace(e, weight=w if e.weight is None else e.weight) for e, w in pairs))


def common_prior(plan: Plan, weight: float) -> Coefficients:
    """Return the coefficients of Task Arithmetic with this prior for every expert that has none of its own."""
    filled = with_prior(plan, weight)
    return Coefficients.constant(first_stage(filled).layout, filled.priors)


def best_prior(losses_WN2: Array, loss_weight_N: Array, hidden_weight: float) -> float:
    """Return the candidate of PRIORS with the smallest Σ βₖ · (L_logit + λ_hid · L_hid) over N samples.

    Args:
        losses_WN2: L_logit and L_hid of each sample for each candidate.
        loss_weight_N: βₖ of each sample.
        hidden_weight: λ_hid.
    """
    totals_W = ((losses_WN2[:, :, 0] + hidden_weight * losses_WN2[:, :, 1]) * loss_weight_N).sum(axis=1)
    return PRIORS[int(np.argmin(totals_W))]


def first_stage(plan: Plan, start: Mapping[str, Sequence[float]] = MappingProxyType({})) -> Stage:
    """Return stage 1: one coefficient per (expert, merged tensor), starting at the prior.

    A tensor in `start` starts at the coefficients there, one for each expert.
    For `adamerging` with `granularity: task`, the coefficients of an expert are tied.
    """
    layout = ChunkLayout.make(plan.numels, dict.fromkeys(plan.merged, 1))
    weights = plan.priors
    prior = Coefficients.constant(layout, weights).values
    config = plan.config
    tied = config.merge_method == "adamerging" and config.parameters.granularity == "task"
    begin = prior.copy()
    for column, name in enumerate(layout.tensors):
        if name in start:
            begin[:, column] = start[name]
    return Stage(1, layout, np.array(weights), begin, prior, tied)


def second_stage(plan: Plan, layout: ChunkLayout, learned: Coefficients) -> Stage:
    """Return stage 2 (Expert Merging++): one coefficient per chunk of `layout`.

    `learned` are the coefficients of stage 1; the options `start` and `fixed` select these or the prior.
    """
    weights = plan.priors
    values = {"prior": Coefficients.constant(layout, weights).values, "stage1": learned.spread(layout).values}
    parameters = plan.config.parameters
    return Stage(2, layout, np.array(weights), values[parameters.start], values[parameters.fixed])


@dataclass(frozen=True)
class StepMetrics:
    """Figures of an optimiser step, taken before the update."""

    regularization: float
    grad_norm: float
    learning_rate: float


class Learner:
    """The coefficients of one stage, α = σ(a), with AdamW and its schedule on a."""

    def __init__(self, parameters: Parameters, stage: Stage) -> None:
        self._parameters, self._stage = parameters, stage
        self._learned = stage.layout.learned_columns
        start = stage.start[:, self._learned]
        if stage.tied:
            start = start[:, :1]
        # Passed through logit and sigmoid like α, so that prior and α are equal bit for bit at the start.
        self._prior = sigmoid(logit(np.repeat(stage.prior[:, None], start.shape[1], axis=1)))
        self._a = torch.nn.Parameter(torch.from_numpy(logit(start)))
        self._optimizer = torch.optim.AdamW(
            [self._a], lr=parameters.learning_rate, betas=(0.9, 0.999), weight_decay=parameters.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            self._optimizer, T_0=PERIOD, T_mult=GROWTH, eta_min=FLOOR * parameters.learning_rate
        )

    @property
    def coefficients(self) -> Coefficients:
        """The current coefficients, [K, layout.width] also if they are tied."""
        values = self._stage.fixed.copy()
        values[:, self._learned] = self._alpha()
        return Coefficients(self._stage.layout, values)

    def step(self, gradient: Array) -> StepMetrics:
        """Take one AdamW step.

        ∂L/∂a = α(1 − α) · (∂L/∂α + γ · ∂R/∂α), with its norm over all coefficients clipped.

        Args:
            gradient: ∂L/∂α [K, layout.width] without the regularisation, the mean over a window. For a tied
                coefficient, its columns are summed.
        """
        parameters, alpha = self._parameters, self._alpha()
        slope = gradient[:, self._learned]
        if self._stage.tied:
            slope = slope.sum(axis=1, keepdims=True)
        pull = parameters.regularization * regularization_gradient(alpha, self._prior)
        self._a.grad = torch.from_numpy(alpha * (1 - alpha) * (slope + pull))
        norm = torch.nn.utils.clip_grad_norm_([self._a], parameters.max_grad_norm).item()
        learning_rate = float(self._schedule.get_last_lr()[0])
        metrics = StepMetrics(regularization(alpha, self._prior), norm, learning_rate)
        self._optimizer.step()
        self._schedule.step()
        return metrics

    def state(self) -> LearnerState:
        """Return the state from which a stage resumes: tensors of a few kilobytes, copied."""
        moments = self._optimizer.state[self._a]
        group, schedule = self._optimizer.param_groups[0], self._schedule
        # All numbers of the schedule fit into float64 without rounding.
        place = [group["lr"], schedule.T_cur, schedule.T_i, schedule.last_epoch]
        tensors = {
            "a": self._a,
            "schedule": torch.tensor(place, dtype=torch.float64),
            **{name: moments[name] for name in MOMENTS if name in moments},
        }
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}

    def restore(self, state: LearnerState) -> None:
        """Resume from a state, bit for bit as without an interruption.

        Raises:
            ValueError: the state is not one of this stage; nothing is changed.
        """
        self._check(state)
        with torch.no_grad():
            self._a.copy_(state["a"])
        # In the memory layout of `a`, as AdamW creates them: the layout decides which instructions a sum uses.
        kept = {name: torch.empty_like(self._a) for name in ("exp_avg", "exp_avg_sq")}
        kept["step"] = torch.empty(())
        self._optimizer.state[self._a] = {name: kept[name].copy_(state[name]) for name in MOMENTS if name in state}
        rate, now, period, last = state["schedule"].tolist()
        schedule = self._schedule
        schedule.T_cur, schedule.T_i, schedule.last_epoch = int(now), int(period), int(last)
        schedule._last_lr = [rate]
        self._optimizer.param_groups[0]["lr"] = rate

    def _check(self, state: LearnerState) -> None:
        """Check names, dtypes, shapes and values of a state, which may come from a file that anyone wrote."""
        shapes = {"a": self._a.shape, "schedule": torch.Size([4])}
        if state.keys() != shapes.keys():
            shapes |= {"step": torch.Size([]), "exp_avg": self._a.shape, "exp_avg_sq": self._a.shape}
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise ValueError("the tensors have other names or shapes than those of this stage")
        for name, tensor in state.items():
            if tensor.dtype != (torch.float32 if name == "step" else torch.float64) or not tensor.isfinite().all():
                raise ValueError(f"{name!r} has another dtype, or values that are not finite")
        rate, now, period, last = state["schedule"].tolist()
        whole = all(number == int(number) for number in (now, period, last))
        if not (whole and 0 <= now < period and 0 <= last <= 2**53 and rate >= 0 and period >= PERIOD):
            raise ValueError("the schedule is at a place that it cannot reach")

    def _alpha(self) -> Array:
        return sigmoid(self._a.detach().numpy())
