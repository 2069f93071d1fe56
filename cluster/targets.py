"""The work of the experts, surveys and targets: as many experts at a time as there are seats."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from actors.process import Report
from cluster.attempt import Attempt
from cluster.crew import Crew
from engine.calibration.samples import Sample
from engine.shards.parts import Surveyed
from engine.sizes import GROUPS_PER_CALL

TARGETS, SURVEY = "computing targets", "reading the experts"


class TargetComputation:
    """Surveys experts and computes the targets of samples on expert actors, in the background of other waits.

    An actor reads one expert, group by group of its tensors, and computes the targets of its samples; then it takes the
    next expert. When no expert is left, it is dismissed and its GPU is free.

    Args:
        attempt: The attempt at the merge.
        crew: Starts and dismisses the actors.
        wanted: The samples of each expert whose targets are not stored.
        before: The number of targets that an earlier start of the run stored.
        groups: The groups of tensors of each expert that are not surveyed; none if nothing must be known of weights.
        surveyed: What the surveys of an earlier start found, by expert and group.
        needed: Bytes of memory that an expert needs on its GPUs.
        check: Called with the free bytes of each GPU of an actor before it gets work; raises if they are too few.

    Attributes:
        nbytes: The bytes of the stored targets.
        reports: The memory reports of the dismissed actors.
    """

    def __init__(
        self,
        attempt: Attempt,
        crew: Crew,
        wanted: Sequence[Sequence[Sample]],
        before: int,
        groups: Sequence[Sequence[int]] = (),
        surveyed: Mapping[tuple[int, int], Surveyed] | None = None,
        needed: float = 0,
        check: Callable[[Sequence[int]], None] = lambda _: None,
    ) -> None:
        self._check = check
        self._crew, self._watch, self._folder = crew, attempt.watch, attempt.folder
        self._advance = attempt.progress.advance
        experts = range(max(len(wanted), len(groups)))
        self._samples = {k: wanted[k] if k < len(wanted) else () for k in experts}
        self._groups = {k: groups[k] if k < len(groups) else () for k in experts}
        self._waiting = deque(k for k in experts if self._samples[k] or self._groups[k])
        self._missing = {(sample.expert, sample.index) for samples in wanted for sample in samples}
        self._unread = {(k, group) for k in experts for group in self._groups[k]}
        self.before, self._count, self.nbytes = before, before, 0
        self._surveyed = dict(surveyed or {})
        self._coming: dict[Any, Any] = {}
        self._open: dict[Any, int] = {}
        self.reports: list[Report] = []
        for seat in range(min(len(self._waiting), crew.seats)):
            actor = crew.expert(seat)
            # The actor gets work after it has started: a seat that another job still occupies must delay nothing.
            self._coming[actor] = actor.ready.remote(needed)

    def begin(self) -> None:
        """Give the actors work as they become ready."""
        for actor, ready in self._coming.items():
            self._watch.later(ready, partial(self._arrived, actor), "starting an expert", unseated=actor)

    def surveyed(self) -> dict[tuple[int, int], Surveyed]:
        """Wait until every expert is surveyed, and return what the surveys found, by expert and group of tensors."""
        self._watch.until(lambda: not self._unread, SURVEY)
        return self._surveyed

    def stored(self, samples: Sequence[tuple[int, int]]) -> None:
        """Wait until the targets of these samples, given as (expert, index), are stored."""
        self._watch.until(lambda: self.has(samples), TARGETS)

    def has(self, samples: Sequence[tuple[int, int]]) -> bool:
        """Return whether the targets of these samples are known to be stored."""
        return self._missing.isdisjoint(samples)

    def all_stored(self) -> None:
        """Wait until every target is stored and every expert actor is dismissed."""
        self._watch.until(lambda: self.ended, TARGETS)

    @property
    def ended(self) -> bool:
        """Whether every target is stored, every expert surveyed, and every expert actor dismissed."""
        return not (self._missing or self._unread or self._open)

    def _arrived(self, actor: Any, free: Sequence[int]) -> None:
        self._check(free)
        del self._coming[actor]
        self._open[actor] = 0
        self._next(actor)

    def _next(self, actor: Any) -> None:
        if not self._waiting:
            self._watch.later(actor.report.remote(), partial(self._release, actor), TARGETS)
            return
        k = self._waiting.popleft()
        groups = self._groups[k]
        for first in range(0, len(groups), GROUPS_PER_CALL):
            read = actor.survey.remote(k, groups[first : first + GROUPS_PER_CALL], self._folder.state)
            self._ask(actor, read, partial(self._read, k), SURVEY)
        for sample in self._samples[k]:
            inputs = self._folder.inputs(sample) if sample.inputs else None
            stored = actor.target.remote(sample, self._folder.state, self._folder.target(sample), inputs)
            self._ask(actor, stored, partial(self._stored, sample), TARGETS)
        if not self._waiting:
            for late, reference in self._coming.items():
                self._watch.forget(reference)
                self._crew.dismiss(late)
            self._coming.clear()

    def _ask(self, actor: Any, reference: Any, then: Any, what: str) -> None:
        """Call `then` with the result of a call of the actor, which after its last result takes the next expert."""

        def answered(result: Any) -> None:
            then(result)
            self._open[actor] -= 1
            if not self._open[actor]:
                self._next(actor)

        self._open[actor] += 1
        self._watch.later(reference, answered, what)

    def _read(self, k: int, found: Mapping[int, Surveyed]) -> None:
        self._surveyed |= {(k, group): record for group, record in found.items()}
        self._unread -= {(k, group) for group in found}
        self._advance(SURVEY, len(self._surveyed))

    def _stored(self, sample: Sample, nbytes: int) -> None:
        self._missing.discard((sample.expert, sample.index))
        self._count += 1
        self.nbytes += nbytes
        self._advance("targets", self._count)

    def _release(self, actor: Any, report: Report) -> None:
        self.reports.append(report)
        del self._open[actor]
        self._crew.dismiss(actor)
