"""The trainer actor: the merged weights, their gradient, the coefficients and the optimiser.

A merge may have several trainers. Each holds the merged model and computes a share of the gradient; the first one adds
the shares up and takes the optimiser step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
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
from engine.models.devices import ONE_DEVICE, Room, give_back, release
from engine.planning.plan import Plan
from engine.planning.schedule import deal, pass_limit, passes
from engine.shards.protocol import Shards
from engine.task_vectors.coefficients import Array, Coefficients


@dataclass(frozen=True)
class WindowSample:
    """A sample of a window, and the reference by which its target is fetched."""

    sample: Sample
    target: Any


@dataclass(frozen=True)
class Share:
    """What one trainer computes of a window.

    Attributes:
        gradients: ∂L/∂α [K, layout.width], float64, by the position among the window's parts; see `Trainer.share`.
        losses: The losses of the samples, by their position in the window.
        traffic: Bytes moved between this trainer and the shards so far, by direction.
    """

    gradients: dict[int, Array]
    losses: dict[int, Losses]
    traffic: dict[str, int]


@dataclass(frozen=True)
class Step:
    """Results of an optimiser step.

    Attributes:
        rows: Rows for merge/metrics.parquet, one per sample.
        state: State of the learner, from which the next step continues.
        traffic: Bytes moved between trainers and shards so far, by direction.
    """

    rows: list[dict[str, Any]]
    state: LearnerState
    traffic: dict[str, int]


class Trainer:
    """Takes one optimiser step per call, computes a share of one, or measures losses without a step.

    A call carries the state of the step before it, so Ray can restart a trainer and retry the call, with the same
    result. Between calls, the trainer keeps the model and the coefficients that are merged into it.

    Args:
        shards: The task vectors, in this process or in shard actors.
        pull: Fetches the tensors of a target by its reference.
        gather: Fetches the share of another trainer by its reference.
        threads, gpus: See `ActorProcess`.
        index: The number of this trainer; 0 takes the steps.
        batch_tokens: Tokens of a pass at most; None: those of a CPU.
        logit_bytes: See `Student`.
        room: What a step needs of the memory of several GPUs.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Shards,
        pull: Callable[[Any], Mapping[str, Packed]],
        gather: Callable[[Any], Any] = lambda share: share,
        threads: int | None = None,
        index: int = 0,
        batch_tokens: int | None = None,
        logit_bytes: int | None = None,
        room: Room = ONE_DEVICE,
        gpus: Gpus = NO_GPUS,
    ) -> None:
        self._process = ActorProcess(f"trainer {index}" if index else "trainer", threads, gpus)
        self._plan, self._shards, self._pull, self._gather = plan, shards, pull, gather
        self._batch_tokens = batch_tokens or pass_limit(plan.config, on_gpu=False)
        self._logit_bytes, self._room = logit_bytes, room
        self._merged: Coefficients | None = None

    @guarded
    def ready(self, wanted: float) -> tuple[int, ...]:
        """Allocate the model if its GPUs have the `wanted` bytes, and return the bytes that were free before.

        None without GPUs; see `ActorProcess.free`.

        Raises:
            ClusterError: The model does not fit on the GPUs.
        """
        free = self._process.free(wanted)
        if free and sum(free) >= wanted:
            _ = self._student
        return free

    @guarded
    def step(
        self,
        stage: Stage,
        state: LearnerState | None,
        number: int,
        window: Sequence[WindowSample],
        ahead: Sequence[WindowSample] = (),
        others: Sequence[Any] = (),
    ) -> Step:
        """Take optimiser step `number` of a stage on one window.

        Args:
            stage: The stage.
            state: The state after the step before; None before the first.
            number: The number of the step.
            window: The samples.
            ahead: The samples of the next window, whose targets are fetched meanwhile.
            others: References to the results of `share` of the other trainers: of the second, the third, …

        Raises:
            RunError: A loss or its gradient is not finite.
        """
        started = time.monotonic()
        own = self.share(stage, state, window, 0, 1 + len(others), ahead)
        shares: list[Share] = [own, *map(self._gather, others)]
        gradients = {part: gradient for share in shares for part, gradient in share.gradients.items()}
        losses = {place: loss for share in shares for place, loss in share.losses.items()}
        # In the order of the parts, whichever trainer computed them.
        gradient: Array = reduce(np.add, (gradients[part] for part in sorted(gradients)))
        if not np.isfinite(gradient).all():
            # The loss may be finite while its gradient overflows, as in float16.
            raise not_finite("gradient of the coefficients", self._student.dtype)
        learner = self._learner(stage, state)
        metrics = learner.step(gradient)
        seconds = time.monotonic() - started
        rows = [
            {
                "stage": stage.number,
                "step": number,
                "model": self._plan.experts[item.sample.expert].name,
                "sample": item.sample.index,
                "kl": losses[place].kl,
                "hidden": losses[place].hidden,
                "entropy": losses[place].entropy,
                "regularization": metrics.regularization,
                "grad_norm": metrics.grad_norm,
                "learning_rate": metrics.learning_rate,
                "seconds": seconds,
            }
            for place, item in enumerate(window)
        ]
        moved = sum((Counter(share.traffic) for share in shares), Counter[str]())
        return Step(rows, learner.state(), {way: moved[way] for way in self._shards.traffic()})

    @guarded
    def share(
        self,
        stage: Stage,
        state: LearnerState | None,
        window: Sequence[WindowSample],
        index: int,
        count: int,
        ahead: Sequence[WindowSample] = (),
    ) -> Share:
        """Return the share of a window's gradient that trainer `index` of `count` computes.

        A part of a window has one gradient of the coefficients. With `gradients: stream`, each pass is a part;
        otherwise all passes are one part, over which the weight gradient is summed. Merged tensors arrive during the
        first forward pass, and weight gradients leave during the last backward pass of each part. The targets of this
        trainer's share of the window `ahead` are fetched meanwhile.

        Raises:
            RunError: A loss is not finite.
        """
        gradients: dict[int, Array] = {}
        losses: dict[int, Losses] = {}
        mine = self._dealt(window, index, count)
        if not mine:
            return Share({}, {}, self._shards.traffic())
        coefficients = self._set(self._learner(stage, state).coefficients)
        for number, part in mine.items():
            leaving = self._shards.gradients(stage.layout)
            for places in part:
                targets = [self._weighted(window[place], 1 / len(window)) for place in places]
                if ahead:  # after the first targets of this window, which are needed first
                    self._prepare(ahead, index, count)
                    ahead = ()
                final = leaving if places is part[-1] else None
                losses |= zip(places, self._student.accumulate(targets, final), strict=True)
            gradients[number] = leaving.collect()
        self._merged = coefficients
        return Share(gradients, losses, self._shards.traffic())

    @guarded
    def measure(
        self, coefficients: Coefficients, window: Sequence[WindowSample], certain: bool = False
    ) -> list[Losses]:
        """Return the losses of each sample of the window with these coefficients, without a step.

        `certain`: also how certain model and expert are, see `Student.measure`.
        """
        self._set(coefficients)
        losses: dict[int, Losses] = {}
        for places in self._passes(window):
            targets = [self._weighted(window[place], 1.0)[0] for place in places]
            losses |= zip(places, self._student.measure(targets, certain), strict=True)
        self._merged = coefficients
        return [losses[place] for place in range(len(window))]

    @guarded
    def load(self) -> None:
        """Load the model, so that the first step need not."""
        _ = self._student

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

    def _learner(self, stage: Stage, state: LearnerState | None) -> Learner:
        """Return the learner of a stage after the step before."""
        learner = Learner(self._plan.config.parameters, stage)
        if state is not None:
            learner.restore(state)
        return learner

    def _set(self, coefficients: Coefficients) -> Coefficients:
        """Start to merge with these coefficients, unless the model holds their merge already.

        `_merged` is None until the caller has run its passes, so that a failed call leaves no wrong claim behind.
        """
        stale, self._merged = self._merged, None
        if stale is None or not stale.same_as(coefficients):
            self._student.expect(self._shards.merge(coefficients, self._student))
        return coefficients

    def _passes(self, window: Sequence[WindowSample]) -> list[list[int]]:
        """Return the positions in the window of the samples of each pass."""
        alone = {place for place, item in enumerate(window) if item.sample.inputs}
        return passes([item.sample.tokens for item in window], self._batch_tokens, alone)

    def _dealt(self, window: Sequence[WindowSample], index: int, count: int) -> dict[int, list[list[int]]]:
        """Return the parts of a window that trainer `index` of `count` computes, by number: the places of each pass."""
        each = self._passes(window)
        parts = [[places] for places in each] if self._plan.config.gradients == "stream" else [each]
        tokens = [sum(_tokens(window, places) for places in part) for part in parts]
        return {number: parts[number] for number in deal(tokens, count)[index]}

    def _prepare(self, window: Sequence[WindowSample], index: int, count: int) -> None:
        """Start to fetch the targets of a trainer's share of a window."""
        dealt = (
            window[place] for part in self._dealt(window, index, count).values() for some in part for place in some
        )
        self._targets.prepare({_key(item): item.target for item in dealt})

    @cached_property
    def _targets(self) -> HeldTargets:
        return HeldTargets(self._pull, self._process.device)

    @cached_property
    def _student(self) -> Student:
        # Loaded in a call and not in __init__: an error raised in a call reaches the driver unchanged.
        device, *others = self._process.devices
        return Student(self._plan, device, replace(self._room, others=tuple(others)), self._logit_bytes)

    def _weighted(self, item: WindowSample, share: float) -> tuple[Target, float]:
        """Return a sample's target and the weight of its losses: βₖ times its share of the window."""
        return self._targets.get(_key(item), item.target), item.sample.loss_weight * share


def _key(item: WindowSample) -> tuple[int, int]:
    return item.sample.expert, item.sample.index


def _tokens(window: Sequence[WindowSample], places: Sequence[int]) -> int:
    """Return the tokens of a pass, padding included."""
    return len(places) * max(window[place].sample.tokens for place in places)
