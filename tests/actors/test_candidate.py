"""The process of trials: the weights of a merge without its files, its score, and a search that finds an optimum."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import weight_space
import yaml

from actors.candidate import Candidate
from actors.gpus import Gpus
from engine.config.documents import read_documents
from engine.evaluation.measure import Evaluation
from engine.evaluation.subject import Options, Subject
from engine.planning.planner import make_plan
from engine.search.merged_model import MergedModel
from engine.search.objective import read_objective
from engine.search.record import Trial
from engine.search.space import Space
from engine.search.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "models.*.parameters.weight"
CPU = torch.device("cpu")
OPTIONS = Options(16, 8, 64)


class Search:
    """A search of a config, in this process."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        models = [{"model": f"expert{k}", "calibration": f"expert{k}.jsonl"} for k in range(2)]
        raw: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
        own = {"space": {KEY: {"low": 0, "high": 1}}, "trials": 40, "algorithm": "cmaes"} | keys.pop("search", {})
        raw |= {"search": own} | keys
        for model in raw["models"]:
            model.setdefault("parameters", {"weight": 0.5})
        path = folder / "search.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        document = read_documents(path)[0]
        search = document.config({}).search
        assert search is not None
        self.search, self.space = search, Space.of(document, search)
        self.objective = read_objective(search, self.plan({}), path)
        self.candidate = Candidate(self.objective, OPTIONS, 1, Gpus(0))

    def plan(self, values: Any) -> Any:
        return make_plan(self.space.config(values), self.space.document.path.parent)

    def score(self, values: Any) -> dict[str, float]:
        plan = self.plan(values)
        self.candidate.load(plan)
        self.candidate.merge(plan)
        return [self.candidate.score(rung) for rung in range(self.search.rungs)][-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("candidate")
    tiny.make_merge(work)
    return work


@pytest.fixture
def made(folder: Path) -> Iterator[Any]:
    opened: list[Search] = []

    def make(**keys: Any) -> Search:
        opened.append(Search(folder, **keys))
        return opened[-1]

    yield make
    for one in opened:
        one.candidate.close()


def test_the_search_finds_the_expert_that_the_merge_is_compared_with(made: Any) -> None:
    search = made(search={"objective": [{"data": "expert0.jsonl", "expert": "expert0"}]})
    study, best = Study(search.space, search.search, 0, 1), Trial(-1, "failed", {}, [[float("inf")]])
    for number in range(60):
        values = study.ask(number)
        trial = Trial(number, "done", values, [search.objective.scores(search.score(values))])
        study.tell(trial)
        best = min(best, trial, key=lambda one: one.last)
    # At weights of 1 and 0 the merge is expert0, and the divergence is 0.
    assert best.last[0] < 0.002
    assert [best.values[f"models.{k}.parameters.weight"] for k in range(2)] == pytest.approx([1, 0], abs=0.1)


def test_a_part_scored_rung_by_rung_scores_as_the_whole(made: Any) -> None:
    values = {"models.0.parameters.weight": 0.3, "models.1.parameters.weight": 0.8}
    one, three = made().score(values), made(search={"rungs": 2}).score(values)
    assert one == pytest.approx(three, rel=1e-6)


def test_a_trial_scores_as_the_evaluation_of_its_written_merge(made: Any, folder: Path, tmp_path: Path) -> None:
    search = made()
    values = {"models.0.parameters.weight": 0.3, "models.1.parameters.weight": 0.8}
    found = search.score(values)
    # Another merge in between leaves nothing behind.
    search.score(dict.fromkeys(values, 1.0))
    assert search.score(values) == found
    plan = search.plan(values)
    written = weight_space.combine(plan, tmp_path / "merged")
    with torch.device("cpu"):
        MergedModel(plan, written, OPTIONS, CPU)  # the files beside the weights
    for part in search.objective.parts:
        subject, expert = (Subject(name, OPTIONS) for name in (type(part.data.expert)(str(written)), part.data.expert))
        subject.load(CPU)
        expert.load(CPU)
        rows = Evaluation(subject, CPU).measure("merged", part.data, expert)
        assert {row.metric: row.value for row in rows}["kl"] == found[part.name]


METHODS: list[dict[str, Any]] = [
    {"merge_method": "task_arithmetic", "out_dtype": "bfloat16"},
    {"merge_method": "ties", "parameters": {"density": 0.5}},
    {"merge_method": "dare_ties", "parameters": {"density": 0.5}, "seed": 3},
    {"merge_method": "swudi"},
    {"merge_method": "task_arithmetic", "calibrate": {"method": "svc"}},
    {"merge_method": "linear", "base_model": None},
]


@pytest.mark.parametrize("keys", METHODS, ids=lambda keys: keys["merge_method"])
def test_the_weights_are_those_of_the_written_merge(folder: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    models = weight_space.entries({"weight": 0.4}, {"weight": 0.7})
    given = {key: value for key, value in ({"base_model": "base", "models": models} | keys).items() if value}
    config = weight_space.write_config(folder, **given)
    plan = weight_space.plan_of(config)
    model = MergedModel(plan, tmp_path, OPTIONS, CPU)
    model.merge(plan, 1)
    written = weight_space.ours(config)
    loaded = {name: weight.to(written[name].dtype) for name, weight in model.model.state_dict().items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
