"""Searches that the command line refuses before any process starts, and what `plan` says of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from advice import Advice
from errors import refused as refuses
from hostile import Server, refused

from cluster.search import prepare
from engine.config.documents import read_documents
from engine.errors import ConfigError, DamagedError
from engine.search.record import Trial, keep_trial, read_trials
from engine.storage.local_folder import LocalFolder

# The advice that other tests follow, or that none can.
ELSEWHERE = {
    "{do}": "test_objective.py: parts with an expert; the other is below",
    "see `python cli.py methods`": "a list to read",
    "write them once with `python cli.py stats`": "test_statistics_on_ray.py",
    "the process of trial": "the process of a trial dies for a reason that it printed",
    "no trial could be scored": "test_search_on_ray.py: another search with --fresh",
    "give another --out": "test_search_on_ray.py: an empty folder",
    "run with --fresh to discard it": "test_search_on_ray.py: test_a_search_finds_and_writes_the_best",
}
KEY = "models.*.parameters.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("search") / "work"
    tiny.make_merge(work)
    (work / "answers.jsonl").write_text(json.dumps({"question": "w1 w2", "response": "w3"}) + "\n")
    return work


def declare(folder: Path, **keys: Any) -> None:
    models = [{"model": f"expert{k}", "calibration": f"expert{k}.jsonl"} for k in range(2)]
    raw: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    raw["search"] = {"space": {KEY: {"low": 0, "high": 1}}, "trials": 9} | keys.pop("search", {})
    (folder / "search.yaml").write_text(yaml.safe_dump(raw | keys), encoding="utf-8")


CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"search": {"space": {KEY: {"low": 1, "high": 0}}}}, [KEY]),
    ({"search": {"space": {"parameters.lamda": [1, 2]}}}, ["lamda"]),
    ({"search": {"objective": [{"data": "answers.jsonl", "metric": "bleu"}]}}, ["bleu", "exact_match"]),
    ({"search": {"objective": [{"data": "answers.jsonl", "expert": "third"}]}}, ["third", "expert0"]),
    ({"search": {"objective": [{"data": "nothing.jsonl"}]}}, ["nothing.jsonl"]),
    ({"models": [{"model": "expert0"}]}, ["expert0", "calibration"]),
    ({"models": [{"model": "expert7", "calibration": "expert0.jsonl"}]}, ["expert7"]),
    ({"merge_method": "regmean", "search": {"space": {"parameters.alpha": [0.5, 1.0]}}}, ["regmean", "stats"]),
    ({"merge_method": "expert_merging", "search": {"space": {"parameters.epochs": [1, 2]}}}, ["expert_merging"]),
]


@pytest.mark.parametrize(("keys", "facts"), CASES, ids=lambda value: str(value)[:60])
def test_bad_input_is_refused_by_search_and_by_plan(
    merger: Server, folder: Path, keys: dict[str, Any], facts: list[str]
) -> None:
    declare(folder, **keys)
    refused(merger.run("search", "search.yaml", cwd=folder), facts, prepared=True)
    refused(merger.run("plan", "search.yaml", cwd=folder), facts, prepared=True)
    assert not (folder / "search").exists()


def test_a_config_without_a_search_is_refused(merger: Server, folder: Path) -> None:
    declare(folder)
    raw = yaml.safe_load((folder / "search.yaml").read_text())
    del raw["search"]
    (folder / "search.yaml").write_text(yaml.safe_dump(raw))
    refused(merger.run("search", "search.yaml", cwd=folder), ["search.yaml", "docs/search.md"], prepared=True)


def test_the_config_may_not_lie_in_the_output(merger: Server, folder: Path) -> None:
    declare(folder)
    refused(merger.run("search", "search.yaml", "--out", ".", cwd=folder), ["search.yaml"], prepared=True)


def test_the_plan_has_the_number_of_evaluations_and_needs_no_torch(planner: Server, folder: Path) -> None:
    declare(folder, search={"rungs": 2})
    ended = planner.run("plan", "search.yaml", cwd=folder)
    assert ended.code == 0, ended.stderr
    # 9 trials on 4 + 3 records; with a third of them, 9 on 2 + 1 and 3 on 2 + 2 more.
    lines = [line for line in ended.stdout.splitlines() if line.startswith("search:")]
    assert "9 merges" in lines[0] and "models.1.parameters.weight" in lines[0]
    assert "63 records" in lines[-1] and "about 39" in lines[-1]
    assert ended.loaded == []


def prepared(folder: Path) -> None:
    prepare(read_documents(folder / "search.yaml")[0])


def test_the_advice_leads_to_a_search(folder: Path) -> None:
    declare(folder)
    prepared(folder)
    raw = yaml.safe_load((folder / "search.yaml").read_text())
    raw["search"]["space"]["models.0.parameters.weight"] = [0, 1]
    (folder / "search.yaml").write_text(yaml.safe_dump(raw))
    with refuses(ConfigError, do="remove"):
        prepared(folder)
    del raw["search"]["space"]["models.0.parameters.weight"]
    (folder / "search.yaml").write_text(yaml.safe_dump(raw))
    prepared(folder)
    declare(folder, merge_method="expert_merging_pp", search={"space": {"parameters.lambda": [0.5, 1.0]}})
    with refuses(ConfigError):
        prepared(folder)
    declare(folder, merge_method="task_arithmetic", search={"space": {"parameters.lambda": [0.5, 1.0]}})
    prepared(folder)


def test_a_damaged_trial_is_removed_and_made_again(tmp_path: Path) -> None:
    kept = LocalFolder(tmp_path)
    for number in range(2):
        keep_trial(kept, Trial(number, "done", {}, [[0.5]]))
    damaged = tmp_path / "trials" / "000001.json"
    damaged.write_text("{")
    with refuses(DamagedError, damaged.name, "remove"):
        read_trials(kept)
    damaged.unlink()
    assert [trial.number for trial in read_trials(kept)] == [0]


def test_all_advice_is_known() -> None:
    advice = Advice(__name__, ELSEWHERE)
    advice.followed("remove one of them", "remove the file", "set another `merge_method`, such as task_arithmetic")
    advice.check()
