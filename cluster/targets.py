"""Experts at work in waves: as many at a time as have a seat, each released when there is nothing left to compute."""

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
    """Computes the targets of `wanted`, the samples of one expert after the other, while other things are waited for.

    An actor that is done with an expert takes the next, without a new process. `before` targets were stored by an
    earlier start of the run; `nbytes` are those of the targets that are stored.
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
        self._waiting = deque(mine for mine in wanted if mine)
        self._missing = {(sample.expert, sample.index) for mine in wanted for sample in mine}
        self.before, self._count, self.nbytes = before, before, 0
        self._coming: dict[Any, Any] = {}
        self._open: dict[Any, int] = {}
        self.reports: list[Report] = []
        for seat in range(min(len(self._waiting), crew.seats)):
            actor = crew.expert(seat)
            # Nothing is asked of it until it is there: a seat that is still another job's must hold nothing up.
            self._coming[actor] = actor.report.remote()
            self._watch.later(self._coming[actor], partial(self._arrived, actor), "starting an expert")

    def stored(self, samples: Sequence[tuple[int, int]]) -> None:
        """Return when the targets of these samples, as (expert, index), are stored."""
        self._watch.until(lambda: self._missing.isdisjoint(samples), WHAT)

    def all_stored(self) -> None:
        """Return when every target is stored, and every expert is gone."""
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
            asked = actor.target.remote(sample, self._folder.state, self._folder.target(sample), inputs)
            self._watch.later(asked, partial(self._stored, actor, sample), WHAT)
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
