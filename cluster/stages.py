"""The training: the search for the prior (`weight: auto`), the optimiser steps of a stage, and the end check.

The trainers are called with one window of samples at a time, as soon as the targets of the window are stored. The state
is stored after every call, so that a restarted run resumes there; meanwhile, the trainers take the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.trainer import WindowSample
from cluster.attempt import Attempt
from cluster.targets import TargetComputation
from cluster.trainers import Trainers
from engine.calibration.samples import Sample
from engine.codec import pack_all
from engine.learning.end_check import BASE, MERGED, PRIOR, end_check, preflight
from engine.learning.learner import (
    PRIORS,
    Learner,
    Stage,
    best_prior,
    common_prior,
    first_stage,
    needs_prior,
    with_prior,
)
from engine.learning.targets import without_targets
from engine.planning.plan import Plan
from engine.planning.schedule import training_order, windows
from engine.run.keys import Computing, Keys
from engine.run.state import StageState
from engine.task_vectors.coefficients import Array, Coefficients


@dataclass(frozen=True)
class Stages:
    """The stages of one attempt at a merge, on its trainers and with its targets."""

    attempt: Attempt
    samples: Sequence[Sequence[Sample]]
    trainers: Trainers
    targets: TargetComputation
    computing: Computing
    # The key of the last state of each stage that is complete.
    _last: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    # The losses at the points that were measured before learning, see `end_check`.
    _losses: dict[str, Array] = field(default_factory=dict, init=False, repr=False, compare=False)

    def find_prior(self) -> Plan:
        """Return the plan with every prior; `auto` becomes the common weight of the smallest loss over all samples."""
        plan, reuse = self.attempt.plan, self.attempt.folder.reuse
        if not needs_prior(plan):
            return plan
        key = self._keys.prior(self._samples(self._once), self.computing)
        reuse.bring_prior(key)
        losses_WN2 = self._measure("prior", [common_prior(plan, weight) for weight in PRIORS])
        self.attempt.folder.check_unchanged(plan)
        reuse.keep_prior(key)
        weights = np.array([sample.loss_weight for window in self._samples(self._once) for sample in window])
        found = best_prior(losses_WN2, weights, plan.config.parameters.hidden_weight)
        self._losses[PRIOR] = losses_WN2[PRIORS.index(found)]
        return with_prior(plan, found)

    def preflight(self) -> None:
        """Measure the losses of the base, and warn of experts that are broken or from which there is nothing to learn.

        Where no prior is missing, this is left to `end_check`: the first step does not wait for all targets.
        """
        if self.attempt.plan.config.has_targets and needs_prior(self.attempt.plan):
            self._measure_base()

    def _measure_base(self) -> None:
        plan = self.attempt.plan
        layout = first_stage(with_prior(plan, 0.0)).layout
        nothing = Coefficients.constant(layout, [0.0] * len(plan.experts))
        (self._losses[BASE],) = self._measure("base", [nothing], certain=True)
        for line in preflight(self._checked()):
            self.attempt.progress.say(f"warning: {line}")

    def end_check(self, merged: Coefficients) -> pa.Table | None:
        """Return the contents of merge/end_check.parquet for the coefficients that are written; None without targets.

        `preflight` and `find_prior` come before.
        """
        if not self.attempt.plan.config.has_targets:
            return None
        if BASE not in self._losses:
            self._measure_base()
        (self._losses[MERGED],) = self._measure("end check", [merged])
        return self._checked()

    def _checked(self) -> pa.Table:
        samples = [sample for window in self._samples(self._once) for sample in window]
        return end_check(self._losses, samples, [expert.name for expert in self.attempt.plan.experts])

    def _measure(self, phase: str, points: Sequence[Coefficients], certain: bool = False) -> Array:
        """Return the losses of each sample of an epoch with these coefficients, without a step, [points, N, 2].

        These are L_logit and L_hid, and with `certain` the certainties of model and expert, [points, N, 4]. What is
        measured is stored after each point.
        """
        folder, name = self.attempt.folder, phase.replace(" ", "-")
        kept = folder.kept(
            name, (None, sum(map(len, self._once)), 4 if certain else 2), "the losses are measured again"
        )
        losses = [] if kept is None else list(kept[: len(points)])
        self.attempt.progress.phase(phase, len(points), len(losses))
        for point in points[len(losses) :]:
            coefficients = ray.put(point)
            calls = [
                self.trainers.measure(coefficients, number, self._window(window), certain)
                for number, window in enumerate(self._once)
            ]
            measured = [one for call in calls for one in self.attempt.watch.answer(call, "measuring losses")]
            losses.append(np.array([(one.kl, one.hidden, *(one.certainties or ())) for one in measured]))
            folder.keep(name, np.array(losses))
            self.attempt.progress.advance(phase, len(losses))
        return np.array(losses)

    def stage(self, stage: Stage) -> Coefficients:
        """Run a stage, one optimiser step per window, and return its coefficients. The state is stored every step."""
        parameters = self.attempt.plan.config.parameters
        order = training_order([len(samples) for samples in self.samples], parameters.epochs)
        steps = windows(order, parameters.gradient_accumulation)
        reuse, before = self.attempt.folder.reuse, self._last.get(1) if stage.number == 2 else ""
        start = stage.start.tolist() if stage.number == 1 and self.attempt.plan.config.closed_form else ()
        keys = self._keys.steps(self._samples(steps), self.computing, before, start)
        reuse.bring_steps(stage.number, keys)
        state = self._state(stage, len(steps))
        phase = f"stage {stage.number}"
        self.attempt.progress.phase(phase, len(steps), state.steps)
        reference = ray.put(stage)

        def begin(number: int) -> Any:
            ahead = steps[number + 1 : number + 2]
            ahead = [window for window in ahead if self.targets.has(window)]
            windows = [self._window(window) for window in (steps[number], *ahead)]
            return self.trainers.step(reference, state.learner, number, *windows)

        # A merge of fewer epochs goes through these states, and one of more epochs through the last but one.
        epochs = {
            end // parameters.gradient_accumulation for end in range(0, len(order), len(order) // parameters.epochs)
        }
        states: dict[int, StageState] = {}
        taken = None
        for number in range(state.steps, len(steps)):
            step = self.attempt.watch.answer(taken or begin(number), "taking a step")
            state, following = StageState(number + 1, step.state), steps[number + 1 : number + 2]
            # Before the state is on the disk: a run that stops meanwhile takes the step again, with the same result.
            taken = begin(number + 1) if following and self.targets.has(following[0]) else None
            self.attempt.folder.save_stage(stage.number, state, step.rows)
            states |= {number + 1: state} if number + 1 in epochs or number + 2 >= len(steps) else {}
            self.attempt.progress.step(phase, number + 1, step.rows, step.traffic | {"targets": self.targets.nbytes})
        self.attempt.folder.check_unchanged(self.attempt.plan)
        reuse.keep_steps(stage.number, keys, states)
        self._last.update({stage.number: keys[-1]} if keys else {})
        learner = Learner(parameters, stage)
        assert state.learner is not None
        learner.restore(state.learner)
        return learner.coefficients

    @property
    def _once(self) -> list[Sequence[tuple[int, int]]]:
        """The windows of one epoch."""
        order = training_order([len(samples) for samples in self.samples], 1)
        return windows(order, self.attempt.plan.config.parameters.gradient_accumulation)

    @property
    def _keys(self) -> Keys:
        return Keys(self.attempt.plan, self.attempt.folder.identity)

    def _samples(self, windows: Sequence[Sequence[tuple[int, int]]]) -> list[list[Sample]]:
        return [[self.samples[k][i] for k, i in window] for window in windows]

    def _state(self, stage: Stage, steps: int) -> StageState:
        """Return the stored state of a stage, if it is one of this stage."""
        state = self.attempt.folder.load_stage(stage.number)
        if state is None:
            return StageState(0, None)
        try:
            if state.learner is None or not 0 < state.steps <= steps:
                raise ValueError("the state has no step, or more than the stage")
            Learner(self.attempt.plan.config.parameters, stage).restore(state.learner)
        except ValueError as error:
            self.attempt.progress.say(f"the stored state of stage {stage.number} is damaged: {error}; it starts again")
            return StageState(0, None)
        return state

    def _window(self, places: Sequence[tuple[int, int]]) -> list[WindowSample]:
        """Wait until the targets of a window are stored, and return its samples with references to the targets.

        A reference is the names of the target's files or, if it has none, the target itself.
        """
        self.targets.stored(places)
        return [WindowSample(self.samples[k][i], self._target(self.samples[k][i])) for k, i in places]

    def _target(self, sample: Sample) -> Any:
        files = [self.attempt.folder.inputs(sample)] if sample.inputs else []
        files += [self.attempt.folder.target(sample)] if self.attempt.plan.config.has_targets else []
        return tuple(files) or pack_all(without_targets(sample).tensors())
