"""The objective of a search: its metrics, the records of its rungs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from errors import refused

from engine.config.reader import load_config
from engine.errors import CalibrationError, ConfigError
from engine.planning.planner import make_plan
from engine.search.objective import Objective, read_objective


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("objective")
    tiny.make_merge(work, samples=(9, 4))
    answers = [{"question": f"w{i} w{i + 1}", "response": f"w{i + 2}"} for i in range(5)]
    choices = [{"question": "w1 w2", "choices": ["w3", "w4"], "answer": "B"}] * 2
    for name, lines in {"answers": answers, "choices": choices, "mixed": [answers[0], choices[0]]}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return work


def objective(folder: Path, given: Any = "kl", models: Any = None, **search: Any) -> Objective:
    own = [{"model": f"expert{k}", "calibration": f"expert{k}.jsonl"} for k in range(2)]
    raw = {"merge_method": "task_arithmetic", "base_model": "base", "models": models or own}
    space = {"parameters.lambda": {"low": 0, "high": 1}}
    raw["search"] = {"space": space, "trials": 9, "objective": given} | search
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    plan = make_plan(load_config(path), folder)
    assert plan.config.search is not None
    return read_objective(plan.config.search, plan, path)


def test_by_default_texts_of_each_expert_are_compared_with_it(folder: Path) -> None:
    made = objective(folder)
    assert [(part.metric, len(part.data.items), part.weight) for part in made.parts] == [("kl", 9, 1), ("kl", 4, 1)]
    assert [Path(str(part.data.expert and part.data.expert.checkpoint)).name for part in made.parts] == [
        "expert0",
        "expert1",
    ]
    assert made.count == 1
    assert made.scores({"expert0: kl": 1.0, "expert1: kl": 3.0}) == [2.0]


def test_parts_have_metrics_of_their_records(folder: Path) -> None:
    made = objective(
        folder,
        [
            {"data": "answers.jsonl"},
            {"data": "answers.jsonl", "metric": "exact_match", "weight": 3},
            {"data": "choices.jsonl"},
            {"data": "expert0.jsonl"},
            {"data": "expert0.jsonl", "expert": "expert1", "metric": "top1_agreement"},
        ],
    )
    metrics = ["loss", "exact_match", "accuracy_likelihood", "perplexity", "top1_agreement"]
    assert [part.metric for part in made.parts] == metrics
    assert [part.generates for part in made.parts] == [False, True, False, False, False]
    assert len({part.name for part in made.parts}) == 5
    values = dict(zip((part.name for part in made.parts), (2.0, 0.5, 0.25, 4.0, 0.75), strict=True))
    # More is better for three of them; the mean is weighted.
    assert made.scores(values) == [pytest.approx((2 - 3 * 0.5 - 0.25 + 4 - 0.75) / 7)]


def test_genetic_algorithms_have_an_objective_for_each_part(folder: Path) -> None:
    made = objective(folder, algorithm="nsga3")
    assert made.count == 2
    assert made.scores({"expert0: kl": 1.0, "expert1: kl": 3.0}) == [1.0, 3.0]


def test_a_rung_has_a_third_of_the_records_of_the_next(folder: Path) -> None:
    made = objective(folder, rungs=3)
    assert [[made.records(part, rung) for rung in range(3)] for part in made.parts] == [[1, 3, 9], [1, 2, 4]]
    assert made.total(9, ends=False) == 9 * 13
    # 9 trials on 2 records, 3 of them on 3 more, one on 8 more.
    assert made.total(9, ends=True) == 9 * 2 + 3 * 3 + 8
    names = [[item.wholes[0].where for item in part.data.items] for part in objective(folder).parts]
    shuffled = [[item.wholes[0].where for item in part.data.items] for part in made.parts]
    assert names != shuffled and [sorted(one) for one in names] == [sorted(one) for one in shuffled]


def test_records_are_limited(folder: Path) -> None:
    assert [len(part.data.items) for part in objective(folder, records=5).parts] == [5, 4]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([{"data": "answers.jsonl", "metric": "bleu"}], ConfigError),
        ([{"data": "answers.jsonl", "metric": "accuracy"}], ConfigError),
        ([{"data": "answers.jsonl", "metric": "kl"}], ConfigError),
        ([{"data": "answers.jsonl", "expert": "expert7"}], ConfigError),
        ([{"data": "mixed.jsonl"}], ConfigError),
        ([{"data": "missing.jsonl"}], (ConfigError, CalibrationError)),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused(folder: Path, given: Any, error: Any) -> None:
    with pytest.raises(error):
        objective(folder, given)


def test_experts_without_texts_cannot_be_compared(folder: Path) -> None:
    models = [{"model": "expert0", "calibration": "expert0.jsonl"}, {"model": "expert1"}]
    with refused(ConfigError, "search.objective", facts=["expert1"]):
        objective(folder, models=models)
