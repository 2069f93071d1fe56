"""The trainer actor: the merged weights, their gradient, the coefficients and the optimiser. Nothing of any expert."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from actors.process import ActorProcess, Report
from engine.calibration.samples import Sample
from engine.codec import Packed, unpack_all
from engine.learning.learner import Learner, Stage
from engine.learning.student import Losses, Student
from engine.learning.targets import Target
from engine.planning.plan import Plan
from engine.planning.schedule import passes
from engine.shards.protocol import Shards
from engine.task_vectors.coefficients import Coefficients


@dataclass(frozen=True)
class WindowSample:
    """One sample of a window, and a reference to its target."""

    sample: Sample
    target: Any


@dataclass(frozen=True)
class Step:
    """What one optimiser step leaves: its rows for merge/metrics.parquet, the state from which to go on, and the bytes
    that moved so far, by direction.
    """

    rows: list[dict[str, Any]]
    state: dict[str, Any]
    traffic: dict[str, int]


class Trainer:
    """One optimiser step a call. `shards` are the task vectors, wherever they are; `pull` fetches a target.

    A call brings the state of the step before it, so a trainer that died is started again and asked again, with the
    same answer. What it keeps between calls is the model, and the knowledge of which coefficients are in it.
    """

    def __init__(self, plan: Plan, shards: Shards, pull: Callable[[Any], Mapping[str, Packed]]) -> None:
        self._process = ActorProcess("trainer")
        self._plan, self._shards, self._pull = plan, shards, pull
        self._merged: Coefficients | None = None

    def step(self, stage: Stage, state: dict[str, Any] | None, number: int, window: Sequence[WindowSample]) -> Step:
        """Step `number` of a stage from one window: merged tensors come in as its first pass runs forward, and their
        gradient leaves as its last one (or, with `gradients: stream`, every one) runs backward.
        """
        started = time.monotonic()
        learner = Learner(self._plan.config.parameters, stage)
        if state is not None:
            learner.restore(state)
        coefficients = self._set(learner.coefficients)
        leaving = self._shards.gradients(stage.layout)
        losses: dict[int, Losses] = {}
        samples, together = [one.sample for one in window], self._passes(window)
        for places in together:
            final = places is together[-1] or self._plan.config.gradients == "stream"
            targets = [self._weighted(window[place], 1 / len(window)) for place in places]
            losses |= zip(places, self._student.accumulate(targets, leaving if final else None), strict=True)
        self._merged = coefficients
        metrics = learner.step(leaving.collect())
        seconds = time.monotonic() - started
        rows = [
            {
                "stage": stage.number,
                "step": number,
                "model": self._plan.experts[sample.expert].name,
                "sample": sample.index,
                "kl": loss.kl,
                "hidden": loss.hidden,
                "entropy": loss.entropy,
                "regularization": metrics.regularization,
                "grad_norm": metrics.grad_norm,
                "learning_rate": metrics.learning_rate,
                "seconds": seconds,
            }
            for sample, loss in ((sample, losses[place]) for place, sample in enumerate(samples))
        ]
        return Step(rows, learner.state(), self._shards.traffic())

    def measure(self, coefficients: Coefficients, window: Sequence[WindowSample]) -> float:
        """Σ βₖ · (L_logit + λ_hid · L_hid) over the window with these coefficients; nothing is learned."""
        self._set(coefficients)
        share, total = self._plan.config.parameters.hidden_weight, 0.0
        for places in self._passes(window):
            samples = [self._weighted(window[place], 1.0) for place in places]
            losses = self._student.measure([target for target, _ in samples])
            total += sum(w * (loss.kl + share * loss.hidden) for (_, w), loss in zip(samples, losses, strict=True))
        self._merged = coefficients
        return total

    def report(self) -> Report:
        """Memory, and the bytes that went to the shards and came from them."""
        return self._process.report(**self._shards.traffic())

    def _set(self, coefficients: Coefficients) -> Coefficients:
        """Have the model merged by these coefficients; what is in it is not known until a caller says so."""
        stale, self._merged = self._merged, None
        if stale is None or not stale.same_as(coefficients):
            self._student.expect(self._shards.merge(coefficients, self._student))
        return coefficients

    def _passes(self, window: Sequence[WindowSample]) -> Sequence[Sequence[int]]:
        """Which samples of the window go through the model together."""
        alone = {place for place, one in enumerate(window) if one.sample.inputs}
        return passes([one.sample.tokens for one in window], self._plan.config.batch_tokens, alone)

    @cached_property
    def _student(self) -> Student:
        # Loaded at the first call, not at the start: what a call raises reaches the driver as it is.
        return Student(self._plan, self._process.device)

    def _weighted(self, one: WindowSample, share: float) -> tuple[Target, float]:
        """The sample's target, and what its losses count: βₖ times its share of the window."""
        # Copies: what arrives lies wherever its buffer begins, and a matrix product's last bit depends on that.
        arrived = {name: tensor.clone() for name, tensor in unpack_all(self._pull(one.target)).items()}
        return Target.from_tensors(arrived), one.sample.loss_weight * share
