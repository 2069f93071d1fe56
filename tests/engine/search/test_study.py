"""The study of a search: algorithms find a known optimum, rungs end bad trials, a study goes on after a loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.documents import read_documents
from engine.config.search.settings import Search
from engine.search.record import Trial, front
from engine.search.space import Space
from engine.search.study import Study

KEY = "models.*.parameters.weight"
BEST = {"models.0.parameters.weight": 0.7, "models.1.parameters.weight": 0.2}


def declared(folder: Path, **search: Any) -> tuple[Space, Search]:
    raw: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base"}
    raw["models"] = [{"model": f"e{k}", "parameters": {"weight": 0.5}} for k in range(2)]
    raw["search"] = {"space": {KEY: {"low": 0, "high": 1}}, "trials": 40} | search
    (folder / "merge.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    document = read_documents(folder / "merge.yaml")[0]
    settings = document.config({}).search
    assert settings is not None
    return Space.of(document, settings), settings


def distance(values: Mapping[str, Any], best: Mapping[str, float] = BEST) -> float:
    return sum((values[name] - wanted) ** 2 for name, wanted in best.items())


def run(study: Study, first: int, last: int, rungs: int = 1, several: bool = False) -> list[Trial]:
    """Trials one after the other, whose score is the distance to the optimum; of two objectives, to two optima."""
    ended = []
    for number in range(first, last):
        values, scores = study.ask(number), list[list[float]]()
        for rung in range(rungs):
            scores.append([distance(values), distance(values, dict.fromkeys(BEST, 0.0))][: 1 + several])
            if study.stops(number, rung, scores[-1][0]):
                break
        trial = Trial(number, "done" if len(scores) == rungs else "stopped", values, scores)
        ended.append(replace(trial, attributes=json.loads(json.dumps(study.tell(trial)))))
    return ended


def best(trials: Sequence[Trial]) -> float:
    return min(trial.last[0] for trial in trials)


@pytest.mark.parametrize(("algorithm", "most"), [("tpe", 0.01), ("cmaes", 0.005), ("random", 0.05)])
def test_the_optimum_is_found(tmp_path: Path, algorithm: str, most: float) -> None:
    space, search = declared(tmp_path, algorithm=algorithm, trials=60)
    trials = run(Study(space, search, 0, 1), 0, 60)
    # The first trial has the values of the config.
    assert trials[0].values == dict.fromkeys(BEST, 0.5)
    assert best(trials) < most < trials[0].last[0]


@pytest.mark.parametrize("algorithm", ["nsga2", "nsga3"])
def test_the_trade_off_of_two_objectives_is_found(tmp_path: Path, algorithm: str) -> None:
    data = [{"data": "a.jsonl"}, {"data": "b.jsonl"}]
    space, search = declared(tmp_path, algorithm=algorithm, trials=120, objective=data)
    trials = run(Study(space, search, 0, 2), 0, 120, several=True)
    found = [trials[number] for number in front(trials)]
    # The true front is the line from (0, 0) to the optimum.
    assert len(found) >= 8
    assert all(abs(0.2 * one - 0.7 * other) < 0.2 for one, other in (t.values.values() for t in found))


@pytest.mark.parametrize("algorithm", ["tpe", "cmaes", "random", "nsga2"])
def test_a_study_of_kept_trials_proposes_what_it_would_have(tmp_path: Path, algorithm: str) -> None:
    several = algorithm == "nsga2"
    data: dict[str, Any] = {"objective": [{"data": "a.jsonl"}, {"data": "b.jsonl"}]} if several else {}
    space, search = declared(tmp_path, algorithm=algorithm, **data)
    whole = run(Study(space, search, 3, 1 + several), 0, 30, several=several)
    resumed = run(Study(space, search, 3, 1 + several, whole[:13]), 13, 30, several=several)
    assert [trial.values for trial in resumed] == [trial.values for trial in whole[13:]]


def test_trials_that_are_behind_end_at_a_rung(tmp_path: Path) -> None:
    space, search = declared(tmp_path, rungs=3, trials=45, algorithm="random")
    trials = run(Study(space, search, 0, 1), 0, 45, rungs=3)
    done = [trial for trial in trials if trial.state == "done"]
    assert 3 <= len(done) <= 20
    assert best(done) == best(trials), "the best of all is never ended"
    stopped = [trial for trial in trials if trial.state == "stopped"]
    assert {len(trial.scores) for trial in stopped} == {1, 2}
