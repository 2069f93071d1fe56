"""The trainers of a merge: the first one, and others in the experts' seats as soon as these are free."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from actors.trainer import WindowSample
from cluster.attempt import Attempt
from cluster.crew import Crew
from cluster.targets import TargetComputation


class Trainers:
    """Deals the work of one attempt to its trainers. Their number may grow at any step, without changing a bit.

    Args:
        attempt: The attempt at the merge.
        crew: Starts and dismisses the actors.
        targets: The work of the experts, after whose end the other trainers start.
        first: The first trainer.
    """

    def __init__(self, attempt: Attempt, crew: Crew, targets: TargetComputation, first: Any) -> None:
        self._attempt, self._crew, self._targets = attempt, crew, targets
        self._ready = [first]
        self._coming: dict[Any, Any] = {}
        self._started = False

    def step(
        self,
        stage: Any,
        state: Any,
        number: int,
        window: Sequence[WindowSample],
        ahead: Sequence[WindowSample] = (),
    ) -> Any:
        """Start an optimiser step on all trainers, and return the reference to its `Step`; see `Trainer.step`."""
        self._start_others()
        first, *others = self._ready
        # In a list, so that Ray starts the first trainer before the others' shares are computed.
        shares = [
            trainer.share.remote(stage, state, window, index, len(self._ready), ahead)
            for index, trainer in enumerate(others, start=1)
        ]
        return first.step.remote(stage, state, number, window, ahead, shares)

    def measure(self, coefficients: Any, number: int, window: Sequence[WindowSample], certain: bool = False) -> Any:
        """Start to measure the losses of window `number`, and return the reference; see `Trainer.measure`."""
        self._start_others()
        return self._ready[number % len(self._ready)].measure.remote(coefficients, window, certain)

    def end(self) -> None:
        """Store the memory reports of the trainers, and dismiss them. Say how many were late for all the work."""
        if late := 1 + len(self._crew.layout.others) - len(self._ready):
            self._attempt.progress.say(f"the training ended before {late} more trainers were at work")
        for trainer, reference in self._coming.items():
            self._attempt.watch.forget(reference)
            self._crew.dismiss(trainer)
        for trainer in self._ready:
            self._attempt.report(trainer)
            self._crew.dismiss(trainer)

    def _start_others(self) -> None:
        """Start the other trainers, once, if every expert has ended. They get work when they have loaded the model."""
        if self._started or not self._targets.ended:
            return
        self._started = True
        for index in range(1, 1 + len(self._crew.layout.others)):
            trainer = self._crew.trainer(index)
            self._coming[trainer] = trainer.load.remote()
            arrived = partial(self._arrived, trainer)
            self._attempt.watch.later(self._coming[trainer], arrived, "starting a trainer", unseated=trainer)

    def _arrived(self, trainer: Any, _: None) -> None:
        del self._coming[trainer]
        self._ready.append(trainer)
        self._attempt.progress.say(f"{len(self._ready)} of {1 + len(self._crew.layout.others)} trainers are at work")
