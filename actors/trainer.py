"""The trainer actor: the merged weights, their gradient, the coefficients and the optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from actors.gpus import NO_GPUS, Gpus
from actors.process import ActorProcess, Report, guarded
from engine.calibration.samples import Sample
from engine.codec import Packed
from engine.learning.held_targets import HeldTargets
from engine.learning.learner import Learner, LearnerState, Stage
from engine.learning.student import Losses, Student, not_finite
from engine.learning.targets import Target
from engine.models.devices import Room, give_back, release
from engine.planning.plan import Plan
from engine.planning.schedule import pass_limit, passes
from engine.shards.protocol import Shards
from engine.task_vectors.coefficients import Coefficients


@dataclass(frozen=True)
class WindowSample:
    """A sample of a window, and the reference by which its target is fetched."""

    sample: Sample
    target: Any


@dataclass(frozen=True)
class Step:
    """Results of an optimiser step.

    Attributes:
        rows: Rows for merge/metrics.parquet, one per sample.
        state: State of the learner, from which the next step continues.
        traffic: Bytes moved between trainer and shards so far, by direction.
    """

    rows: list[dict[str, Any]]
    state: LearnerState
    traffic: dict[str, int]


class Trainer:
    """Takes one optimiser step per call, or measures losses without a step.

    A call carries the state of the step before it, so Ray can restart a trainer and retry the call, with the same
    result. Between calls, the trainer keeps the model and the coefficients that are merged into it.

    Args:
        shards: The task vectors, in this process or in shard actors.
        pull: Fetches the tensors of a target by its reference.
        threads, gpus: See `ActorProcess`.
        batch_tokens: Tokens of a pass at most; None: those of a CPU.
        logit_bytes: See `Student`.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Shards,
        pull: Callable[[Any], Mapping[str, Packed]],
        threads: int | None = None,
        batch_tokens: int | None = None,
        logit_bytes: int | None = None,
        gpus: Gpus = NO_GPUS,
    ) -> None:
        self._process = ActorProcess("trainer", threads, gpus)
        self._plan, self._shards, self._pull = plan, shards, pull
        self._batch_tokens = batch_tokens or pass_limit(plan.config.batch_tokens, on_gpu=False)
        self._logit_bytes = logit_bytes
        self._merged: Coefficients | None = None

    @guarded
    def step(
        self,
        stage: Stage,
        state: LearnerState | None,
        number: int,
        window: Sequence[WindowSample],
        ahead: Sequence[WindowSample] = (),
    ) -> Step:
        """Take optimiser step `number` of a stage on one window, and fetch the targets of the window `ahead` meanwhile.

        Merged tensors arrive during the forward pass of the window's first pass. Their gradient leaves during the
        backward pass of the last one (with `gradients: stream`: of each one).

        Raises:
            RunError: A loss or its gradient is not finite.
        """
        started = time.monotonic()
        learner = Learner(self._plan.config.parameters, stage)
        if state is not None:
            learner.restore(state)
        coefficients = self._set(learner.coefficients)
        leaving = self._shards.gradients(stage.layout)
        losses: dict[int, Losses] = {}
        samples, batches = [item.sample for item in window], self._passes(window)
        for places in batches:
            final = places is batches[-1] or self._plan.config.gradients == "stream"
            targets = [self._weighted(window[place], 1 / len(window)) for place in places]
            if places is batches[0]:  # its own targets were needed first
                self._targets.prepare({_key(item): item.target for item in ahead})
            losses |= zip(places, self._student.accumulate(targets, leaving if final else None), strict=True)
        self._merged = coefficients
        gradient = leaving.collect()
        if not np.isfinite(gradient).all():
            # The loss may be finite while its gradient overflows, as in float16.
            raise not_finite("gradient of the coefficients", self._student.dtype)
        metrics = learner.step(gradient)
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

    @guarded
    def measure(self, coefficients: Coefficients, window: Sequence[WindowSample]) -> float:
        """Return Σ βₖ · (L_logit + λ_hid · L_hid) over the window with these coefficients, without a step."""
        self._set(coefficients)
        share, total = self._plan.config.parameters.hidden_weight, 0.0
        for places in self._passes(window):
            samples = [self._weighted(window[place], 1.0) for place in places]
            losses = self._student.measure([target for target, _ in samples])
            total += sum(w * (loss.kl + share * loss.hidden) for (_, w), loss in zip(samples, losses, strict=True))
        self._merged = coefficients
        return total

    def report(self) -> Report:
        """Return the memory figures of the process, and the bytes sent to and received from the shards."""
        return self._process.report(**self._shards.traffic())

    def forget(self) -> None:
        """Drop the model with all gradients, and free their memory. The next call loads it again."""
        student, self._merged = self.__dict__.pop("_student", None), None
        if student is not None:
            release(student.model)
            del student
        give_back()

    def _set(self, coefficients: Coefficients) -> Coefficients:
        """Start to merge with these coefficients, unless the model holds their merge already.

        `_merged` is None until the caller has run its passes, so that a failed call leaves no wrong claim behind.
        """
        stale, self._merged = self._merged, None
        if stale is None or not stale.same_as(coefficients):
            self._student.expect(self._shards.merge(coefficients, self._student))
        return coefficients

    def _passes(self, window: Sequence[WindowSample]) -> Sequence[Sequence[int]]:
        """Return the positions in the window of the samples of each pass."""
        alone = {place for place, item in enumerate(window) if item.sample.inputs}
        return passes([item.sample.tokens for item in window], self._batch_tokens, alone)

    @cached_property
    def _targets(self) -> HeldTargets:
        return HeldTargets(self._pull, self._process.device)

    @cached_property
    def _student(self) -> Student:
        # Loaded in a call and not in __init__: an error raised in a call reaches the driver unchanged.
        device, *others = self._process.devices
        return Student(self._plan, device, Room(tuple(others)), self._logit_bytes)

    def _weighted(self, item: WindowSample, share: float) -> tuple[Target, float]:
        """Return a sample's target and the weight of its losses: βₖ times its share of the window."""
        return self._targets.get(_key(item), item.target), item.sample.loss_weight * share


def _key(item: WindowSample) -> tuple[int, int]:
    return item.sample.expert, item.sample.index
