"""The computation of targets: as many experts at a time as there are seats."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from actors.process import Report
from cluster.attempt import Attempt
from cluster.crew import Crew
from engine.calibration.samples import Sample

WHAT = "computing targets"


class TargetComputation:
    """Computes the targets of the samples in `wanted` on expert actors, in the background of other waits.

    An actor that has finished the samples of one expert takes the next expert. When no samples are left, it is
    dismissed and its GPU is free.

    Attributes:
        before: The number of targets that an earlier start of the run stored.
        nbytes: The bytes of the stored targets.
        reports: The memory reports of the dismissed actors.
    """

    def __init__(
        self,
        attempt: Attempt,
        crew: Crew,
        wanted: Sequence[Sequence[Sample]],
        before: int,
    ) -> None:
        self._crew, self._watch, self._folder = crew, attempt.watch, attempt.folder
        self._advance = attempt.progress.advance
        self._waiting = deque(samples for samples in wanted if samples)
        self._missing = {(sample.expert, sample.index) for samples in wanted for sample in samples}
        self.before, self._count, self.nbytes = before, before, 0
        self._coming: dict[Any, Any] = {}
        self._open: dict[Any, int] = {}
        self.reports: list[Report] = []
        for seat in range(min(len(self._waiting), crew.seats)):
            actor = crew.expert(seat)
            # The actor gets work after it has started: a seat that another job still occupies must delay nothing.
            self._coming[actor] = actor.report.remote()
            self._watch.later(self._coming[actor], partial(self._arrived, actor), "starting an expert", unseated=actor)

    def stored(self, samples: Sequence[tuple[int, int]]) -> None:
        """Wait until the targets of these samples, given as (expert, index), are stored."""
        self._watch.until(lambda: self._missing.isdisjoint(samples), WHAT)

    def all_stored(self) -> None:
        """Wait until every target is stored and every expert actor is dismissed."""
        self._watch.until(lambda: not self._missing and not self._open, WHAT)

    def _arrived(self, actor: Any, _: Report) -> None:
        del self._coming[actor]
        self._open[actor] = 0
        self._next(actor)

    def _next(self, actor: Any) -> None:
        if not self._waiting:
            self._watch.later(actor.report.remote(), partial(self._release, actor), WHAT)
            return
        for sample in self._waiting.popleft():
            self._open[actor] += 1
            inputs = self._folder.inputs(sample) if sample.inputs else None
            stored = actor.target.remote(sample, self._folder.state, self._folder.target(sample), inputs)
            self._watch.later(stored, partial(self._stored, actor, sample), WHAT)
        if not self._waiting:
            for late, reference in self._coming.items():
                self._watch.forget(reference)
                self._crew.dismiss(late)
            self._coming.clear()

    def _stored(self, actor: Any, sample: Sample, nbytes: int) -> None:
        self._missing.discard((sample.expert, sample.index))
        self._count += 1
        self.nbytes += nbytes
        self._advance("targets", self._count)
        self._open[actor] -= 1
        if not self._open[actor]:
            self._next(actor)

    def _release(self, actor: Any, report: Report) -> None:
        self.reports.append(report)
        del self._open[actor]
        self._crew.dismiss(actor)
