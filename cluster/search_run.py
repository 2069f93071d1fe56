"""A search in its folder: the trials that have ended, and those that run."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from cluster.progress import Progress
from engine.config.search.settings import Search
from engine.errors import MergeError
from engine.evaluation.subject import Options
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.search.objective import Objective
from engine.search.record import Trial, best_of, keep_trial, read_trials
from engine.search.space import Space, check_method
from engine.search.study import Study
from engine.shards.settings import check_settings
from engine.storage.folder import Folder


@dataclass(frozen=True)
class Prepared:
    """A search whose inputs are checked.

    Attributes:
        search: Its settings.
        space: Its space.
        plan: The plan of the config without the search.
        objective: What is scored.
        options: Options of the evaluations.
    """

    search: Search
    space: Space
    plan: Plan
    objective: Objective
    options: Options

    def trial_plan(self, values: Any) -> Plan:
        """Return the plan of a trial.

        Raises:
            MergeError: The values do not fit the models.
        """
        plan = make_plan(self.space.config(values), self.space.document.path.absolute().parent)
        check_method(plan.config, str(self.space.document.path))
        check_settings(plan)
        return plan


class SearchRun:
    """A search in its folder: the trials that have ended, and those that run.

    Args:
        prepared: The search.
        folder: The output.
        progress: Shows the trials that have ended.
    """

    def __init__(self, prepared: Prepared, folder: Folder, progress: Progress) -> None:
        self.prepared, self.folder, self.progress = prepared, folder, progress
        self.trials = read_trials(folder)
        seed, count = prepared.plan.config.seed, prepared.objective.count
        self.study = Study(prepared.space, prepared.search, seed, count, self.trials)
        self.error: MergeError | None = None
        self._running: dict[int, tuple[Any, float]] = {}
        self._first = True

    @property
    def wanted(self) -> int:
        """The number of trials of the whole search."""
        return self.prepared.search.trials

    @property
    def running(self) -> bool:
        """Whether trials run."""
        return bool(self._running)

    def next(self) -> tuple[int, Plan] | None:
        """Return the number and the plan of a new trial; None if there are enough, or the search has failed."""
        while self.error is None and len(self.trials) + len(self._running) < self.wanted:
            taken = {trial.number for trial in self.trials} | self._running.keys()
            number = next(number for number in range(self.wanted) if number not in taken)
            values = self.study.ask(number)
            self._running[number] = values, time.monotonic()
            try:
                return number, self.prepared.trial_plan(values)
            except MergeError as error:
                self.end(number, [], {}, str(error))
        return None

    def stops(self, number: int, rung: int, metrics: dict[str, float]) -> bool:
        """Return whether a trial is to end after a rung."""
        return self.study.stops(number, rung, sum(self.prepared.objective.scores(metrics)))

    def end(self, number: int, scores: list[list[float]], metrics: dict[str, float], why: str = "") -> None:
        """Record the end of a trial. `why`: the reason of its failure."""
        values, began = self._running.pop(number)
        done = len(scores) == self.prepared.search.rungs
        trial = Trial(number, "failed" if why else "done" if done else "stopped", values, scores, metrics)
        trial = replace(trial, seconds=time.monotonic() - began, why=why)
        trial = replace(trial, attributes=self.study.tell(trial))
        keep_trial(self.folder, trial)
        self.trials.append(trial)
        best = best_of(self.trials)
        told = f"trial {number}: " + (f"{sum(trial.last):.6g}" if trial.last else trial.state)
        told += f"  best: trial {best.number}, {sum(best.last):.6g}" if best is not None else ""
        self.progress.advance("searching", len(self.trials), told)
        left = self.wanted - len(self.trials)
        if self._first and left and not why:
            self._first = False
            self.progress.say(f"a trial takes {trial.seconds:.1f} s; {left} trials are left")
