"""The trials of a search on Ray Tune: the process of a trial, and what Tune asks the driver."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import ray

# Set before Tune is imported: no tables and plots of its own, and Ctrl-C as in all commands.
os.environ |= {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from actors.candidate import Candidate
from actors.gpus import Gpus
from cluster.evaluation import task_cpus
from cluster.search_run import SearchRun
from cluster.session import nodes
from engine.errors import CheckpointError, MergeError, RunError
from engine.evaluation.subject import Options
from engine.machine import usable_cpus
from engine.planning.plan import Plan
from engine.search.objective import Objective

# Times that a trial is started again on another process after the loss of its own.
RESTARTS = 3


class TrialProcess(tune.Trainable):  # type: ignore[misc]
    """The process of one trial after the other; see `Candidate`. A step scores a rung.

    An error for the user is a result, which the driver judges: Ray Tune would print it and try again.
    """

    def setup(self, config: dict[str, Any], plan: Plan, objective: Objective, options: Options, gpus: int) -> None:
        """See `tune.Trainable`. `plan`: that of the search, from which those of trials differ."""
        given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        threads = max(1, min(int(given), usable_cpus()))
        self._candidate = Candidate(objective, options, threads, Gpus(gpus, tuple(ray.get_gpu_ids())))
        self._search, self._rungs = plan, objective.rungs
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See `tune.Trainable`: keep the process, and its model, for another trial."""
        self._plan = replace(self._search, **new_config["changes"])
        self._rung = 0
        return True

    def step(self) -> dict[str, Any]:
        """Score the trial on the records of the next rung; see `tune.Trainable`."""
        try:
            if self._rung == 0:
                self._candidate.load(self._plan)
            try:
                if self._rung == 0:
                    self._candidate.merge(self._plan)
                metrics = self._candidate.score(self._rung)
            except (CheckpointError, RunError) as error:
                # Weights or logits that are not finite: no good merge, and the search goes on.
                return {"failed": str(error), "rung": self._rung, "done": True}
        except MergeError as error:
            return {"error": error, "rung": self._rung, "done": True}
        self._rung += 1
        # Pairs, as Ray Tune flattens mappings.
        return {"metrics": tuple(metrics.items()), "rung": self._rung - 1, "done": self._rung == self._rungs}

    def cleanup(self) -> None:
        """See `tune.Trainable`."""
        self._candidate.close()


class _OfDriver:
    """What stays in the driver: Ray Tune stores its own state, from which nothing is ever restored here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Proposals(_OfDriver, Searcher):  # type: ignore[misc]
    """What Ray Tune asks for new trials and tells of those that ended."""

    def __init__(self, run: SearchRun) -> None:
        super().__init__(metric="rung", mode="min")
        self._run = run
        self.numbers: dict[str, int] = {}
        self._plans: dict[int, Plan] = {}
        # Trials to start again, and how often a trial has lost its process.
        self._again: list[int] = []
        self._losses: Counter[int] = Counter()
        self.scores: dict[str, list[list[float]]] = {}

    def suggest(self, trial_id: str) -> Any:
        if self._again and self._run.error is None:
            number = self._again.pop(0)
        elif (found := self._run.next()) is not None:
            number, plan = found
            self._plans[number] = plan
        else:
            # Nothing for now: a trial that runs may have to start again.
            return None if self._run.running and self._run.error is None else Searcher.FINISHED
        self.numbers[trial_id] = number
        return {"changes": differences(self._run.prepared.plan, self._plans[number])}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        run, number = self._run, self.numbers[trial_id]
        if (error or result is None) and self._losses[number] < RESTARTS:
            # Not by Ray Tune, whose trials that lose their process while they take it over are lost themselves.
            self._losses[number] += 1
            self._again.append(number)
            return
        del self._plans[number]
        if error or result is None:
            do = "run with --debug to see what it printed at its end; then run the same command to resume"
            run.error = RunError(f"the process of trial {number} died {RESTARTS + 1} times", do=do)
        elif "error" in result:
            run.error = result["error"]
        elif "failed" in result:
            run.end(number, [], {}, result["failed"])
        else:
            # Of a trial that is done by itself, the scheduler does not hear.
            self.hear(trial_id, result)
            run.end(number, self.scores[trial_id], dict(result["metrics"]))

    def hear(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take the scores of a rung. A trial that lost its process has begun again."""
        scores = self._run.prepared.objective.scores(dict(result["metrics"]))
        self.scores[trial_id] = [*self.scores.get(trial_id, [])[: result["rung"]], scores]

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trials are recorded elsewhere."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; see `save`."""


class _Rungs(_OfDriver, FIFOScheduler):  # type: ignore[misc]
    """Ends trials at rungs."""

    def __init__(self, run: SearchRun, proposals: _Proposals) -> None:
        super().__init__()
        self._run, self._proposals = run, proposals

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "metrics" not in result:
            return str(self.STOP)
        self._proposals.hear(trial.trial_id, result)
        number = self._proposals.numbers[trial.trial_id]
        stops = self._run.stops(number, result["rung"], dict(result["metrics"]))
        return str(self.STOP if stops else self.CONTINUE)


def differences(before: Plan, after: Plan) -> dict[str, Any]:
    """Return the fields in which a plan differs from an earlier one: of most trials the config alone.

    Ray Tune keeps what it sends to each trial, and a plan has the header of each model.
    """
    pairs = ((field.name, getattr(after, field.name)) for field in fields(Plan))
    return {name: value for name, value in pairs if value != getattr(before, name)}


def run_trials(run: SearchRun, debug: bool) -> None:
    """Run the trials that are left. What fails is in `run.error`.

    Raises:
        ClusterError: No node has the CPU and the GPU of a trial.
    """
    logging.getLogger("ray.tune").setLevel(logging.INFO if debug else logging.CRITICAL)
    prepared, found = run.prepared, nodes()
    gpus = int(any(node.gpus for node in found))
    parallel = prepared.search.parallel
    if parallel == "auto":
        parallel = int(sum(node.gpus for node in found)) if gpus else sum(node.cpus >= 1 for node in found)
    cpus = task_cpus(found, gpus, max(1, parallel))
    shared = {name: getattr(prepared, name) for name in ("plan", "objective", "options")}
    process = tune.with_parameters(TrialProcess, **shared, gpus=gpus)
    trainable = tune.with_resources(process, {"cpu": cpus, "gpu": gpus})
    proposals = _Proposals(run)
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=proposals,
                scheduler=_Rungs(run, proposals),
                num_samples=-1,
                max_concurrent_trials=max(1, parallel),
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                # A trial is repeated from its beginning. Its process stores nothing, and no folder is shared by nodes.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
                callbacks=[],
            ),
        ).fit()
