"""The study of a search: Optuna proposes the values of a trial from those that have ended, and ends trials at rungs.

A trial's proposal depends on the seed, its number and the trials that had ended before it, so that a search with one
trial at a time proposes the same after a loss as without one. `cmaes` and the genetic algorithms keep their state in
the attributes of trials.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.config.search.dimensions import Dimension
from engine.config.search.settings import REDUCTION, Search, Value
from engine.search.record import Trial
from engine.search.space import Space

# Of TPE: random trials before the first proposal, as Optuna's default, or a quarter of a short search.
FIRST = 10


class Study:
    """A study. Optuna is imported here, as only a search needs it.

    Args:
        space: The space.
        search: The settings.
        seed: The seed of the config.
        objectives: The number of objectives.
        ended: The trials of earlier starts.
    """

    def __init__(self, space: Space, search: Search, seed: int, objectives: int, ended: Sequence[Trial] = ()) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._search, self._seed, self._objectives = space, search, seed, objectives
        self._distributions = {name: _distribution(one) for name, one in space.dimensions.items()}
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
        self._study = optuna.create_study(directions=["minimize"] * objectives, pruner=pruner)
        self._asked: dict[int, Any] = {}
        for trial in ended:
            self._add(trial)

    def ask(self, number: int) -> dict[str, Value]:
        """Return the values of a new trial. The first has those of the config, if it has a value of every key."""
        self._study.sampler = self._sampler(number)
        given = self._space.given() if number == 0 else None
        if given is not None:
            self._study.enqueue_trial(given)
        self._asked[number] = asked = self._study.ask(self._distributions)
        return dict(asked.params)

    def stops(self, number: int, rung: int, score: float) -> bool:
        """Report the score of a trial after a rung, from 0, and return whether the trial is to end there."""
        if self._search.rungs == 1 or rung == self._search.rungs - 1:
            return False
        asked = self._asked[number]
        asked.report(score, REDUCTION**rung)
        return bool(asked.should_prune())

    def tell(self, trial: Trial) -> dict[str, Any]:
        """Report the end of a trial that was asked for, and return the state of the algorithm to keep with it."""
        from optuna.trial import TrialState

        asked, several = self._asked.pop(trial.number), self._objectives > 1
        if trial.state == "done":
            self._study.tell(asked, trial.last)
        else:
            # TPE takes a pruned trial without a score for the worst. A study of several objectives has none.
            self._study.tell(asked, state=TrialState.FAIL if several else TrialState.PRUNED)
        frozen = self._study.trials[asked.number]
        return dict(frozen.system_attrs)

    def _add(self, trial: Trial) -> None:
        from optuna.trial import TrialState, create_trial

        done, several = trial.state == "done", self._objectives > 1
        reported = trial.scores[:-1] if done else trial.scores
        self._study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if done else TrialState.FAIL if several else TrialState.PRUNED,
                values=trial.last if done else None,
                params=trial.values,
                distributions=self._distributions,
                system_attrs=trial.attributes,
                intermediate_values={} if several else {REDUCTION**rung: one[0] for rung, one in enumerate(reported)},
            )
        )

    def _sampler(self, number: int) -> Any:
        from optuna import samplers
        from optuna.exceptions import ExperimentalWarning

        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        trials = self._search.trials
        population = max(4, min(50, trials // 4))
        match self._search.algorithm:
            case "tpe":
                return samplers.TPESampler(seed=seed, n_startup_trials=max(1, min(FIRST, trials // 4)))
            case "cmaes":
                return samplers.CmaEsSampler(seed=seed)
            case "nsga2":
                return samplers.NSGAIISampler(seed=seed, population_size=population)
            case "nsga3":
                with warnings.catch_warnings():
                    # That it may change in another version.
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    return samplers.NSGAIIISampler(seed=seed, population_size=population)
            case "random":
                return samplers.RandomSampler(seed=seed)


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    if dimension.choices:
        return distributions.CategoricalDistribution(dimension.choices)
    if dimension.integer:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
