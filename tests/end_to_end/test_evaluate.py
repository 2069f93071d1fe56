"""Evaluations through the real command line: in one process, on Ray, by the harness; and input that is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import errors
import pyarrow.parquet
import pytest
import tiny
from conftest import plan_of
from hostile import Server, refused
from recorded_merges import write_merge

from cluster.evaluation import EvaluationJob, spread, task_cpus
from cluster.seats import Node
from engine.calibration.records import Record
from engine.checkpoints.find import ModelName
from engine.errors import ClusterError
from engine.evaluation.items import DataSet, make_item
from engine.evaluation.lm_eval_harness import Tasks, rows_of
from engine.evaluation.results import Row
from engine.evaluation.subject import Options
from engine.run.contents import write_manifest
from engine.storage.local_folder import LocalFolder

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("warm")


def cli(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "200"}
    command = [sys.executable, ROOT / "cli.py", "evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=environment, check=False)


def scores(file: Path) -> dict[tuple[str, str, str], tuple[float, int]]:
    rows = [Row(**row) for row in pyarrow.parquet.read_table(file).to_pylist()]
    return {(row.model, row.data, row.metric): (row.value, row.count) for row in rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a base, two experts of it, and data of each kind."""
    work = tmp_path / "work"
    tiny.make_merge(work)
    for name in ("expert0", "expert1"):
        tiny.save_tokenizer(work / name)
    lines: list[dict[str, Any]] = [{"question": f"w{i} w{i + 1}", "response": f"w{i + 2}"} for i in range(5)]
    (work / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choices = [{"question": "w1 w2", "choices": ["w3", "w4"], "answer": "B"}] * 2
    (work / "choices.json").write_text(json.dumps(choices))
    return work


@pytest.fixture
def evaluate(merger: Server, folder: Path) -> Any:
    """The command in a process where Ray may not start."""
    return lambda *arguments: merger.run("evaluate", *arguments, cwd=folder)


@pytest.mark.slow
def test_one_model_in_this_process(evaluate: Any, folder: Path) -> None:
    files = ("--data", "answers.jsonl", "--data", "expert0.jsonl", "--data", "choices.json")
    ended = evaluate("base", *files, "--expert", "expert0", "--max-new-tokens", "5", "--out", "out/table.parquet")
    assert ended.code == 0, ended.stderr
    rows = scores(folder / "out" / "table.parquet")
    assert [(data, metric) for model, data, metric in rows if model == "base"] == [
        *(("answers", metric) for metric in ("exact_match", "f1", "loss", "perplexity")),
        *(("expert0", metric) for metric in ("perplexity", "kl", "top1_agreement", "hidden_distance")),
        ("expert0", "hidden_relative"),
        *(("choices", metric) for metric in ("accuracy", "accuracy_likelihood")),
    ]
    assert [count for (_, data, _), (_, count) in rows.items() if data == "answers"] == [5, 5, 10, 10] * 2
    of_expert = {(data, metric) for model, data, metric in rows if model == "expert0"}
    assert of_expert == {(data, metric) for _, data, metric in rows if data != "expert0"}, "texts are compared instead"
    assert rows["base", "expert0", "kl"][0] > 0
    assert f"{rows['base', 'expert0', 'perplexity'][0]:.4g}" in ended.stdout
    assert "top1_agreement" in ended.stdout and "evaluating 5/5" in ended.stdout
    assert [path.name for path in (folder / "out").iterdir()] == ["table.parquet"]
    assert not (folder / "base" / "merge").exists()


def test_scores_are_recorded_in_the_output_of_a_merge(evaluate: Any, folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "merged")
    out = LocalFolder(write_merge(plan_of(folder / "merge.yaml"), folder / "merged"))
    write_manifest(out, out, out, set())
    ended = evaluate("merged", "--data", "answers.jsonl", "--limit", "1", "--max-new-tokens", "2", "--record")
    assert ended.code == 0, ended.stderr
    assert scores(out.path / "merge" / "evaluation.parquet") == scores(folder / "evaluation.parquet")
    assert "## Scores" in (out.path / "README.md").read_text() and str(out.path) in ended.stdout


@pytest.mark.slow
def test_models_on_ray(folder: Path) -> None:
    data = ("--data", "answers.jsonl", "--data", "expert0.jsonl", "--data", "expert1.jsonl", "--limit", "3")
    experts = ("--expert", "expert0", "--expert", "expert0", "--expert", "expert1")
    done = cli("expert0", "expert1", *data, *experts, "--max-new-tokens", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = scores(folder / "evaluation.parquet")
    assert list(dict.fromkeys(model for model, _, _ in rows)) == ["expert0", "expert1"]
    for model in ("expert0", "expert1"):
        assert rows[model, "answers", "exact_match"][1] == 3
        for name in ("expert0", "expert1"):
            assert (rows[model, name, "kl"][0] == 0) == (model == name)
            assert (rows[model, name, "top1_agreement"][0] == 1) == (model == name)
    assert "evaluating 2/2" in done.stdout and "Traceback" not in done.stderr


# By name: the arguments, and the facts that the message must contain.
WRONG: dict[str, tuple[list[str], list[str]]] = {
    "nothing to do": (["base"], ["--data", "--task"]),
    "no output to record in": (["base", "--data", "answers.jsonl", "--record"], ["--record: ", "merge/config.yaml"]),
    "no model": (["nothing", "--data", "answers.jsonl"], ["nothing: ", "folder"]),
    "no weights": (["empty", "--data", "answers.jsonl"], ["empty/config.json", "No such file"]),
    "an adapter": (["adapter", "--data", "answers.jsonl"], ["work/adapter/adapter_config.json: ", "BASE+adapter"]),
    "no data": (["base", "--data", "nothing.jsonl"], ["work/nothing.jsonl", "data file"]),
    "another kind of data": (["base", "--data", "data.csv"], ["data.csv: ", "'.csv'", ".parquet"]),
    "a spoilt record": (["base", "--data", "spoilt.jsonl"], ["spoilt.jsonl:2", "input_ids, messages, question, text"]),
    "two kinds": (["base", "--data", "kinds.jsonl"], ["kinds.jsonl:2", "kind"]),
    "a record that is too long": (
        ["base", "--data", "answers.jsonl", "--max-length", "4"],
        ["answers.jsonl:1", "at most 4", "--max-length"],
    ),
    "no room to write": (
        ["base", "--data", "answers.jsonl", "--max-new-tokens", "125"],
        ["answers.jsonl:1", "130 ", "128 ", "--max-new-tokens"],
    ),
    "a number of experts": (
        ["base", "--data", "expert0.jsonl", "--expert", "expert0", "--expert", "expert1"],
        ["--expert: ", "2 experts", "--data"],
    ),
    "no expert": (["base", "--data", "expert0.jsonl", "--expert", "nothing"], ["nothing: ", "folder"]),
    "an expert of another size": (
        ["base", "--data", "expert0.jsonl", "--expert", "other"],
        ["work/other: ", "2 blocks", "3 blocks", "work/base"],
    ),
    "results of another kind": (["base", "--data", "answers.jsonl", "--out", "x.csv"], ["x.csv: ", ".parquet"]),
    "results in the place of a folder": (
        ["base", "--data", "answers.jsonl", "--out", "x.parquet"],
        ["x.parquet: ", "a folder"],
    ),
    "a second model": (["base", "empty", "--data", "answers.jsonl"], ["empty/config.json", "No such file"]),
}


@pytest.mark.parametrize(("arguments", "facts"), WRONG.values(), ids=list(WRONG))
def test_wrong_input_is_refused_before_anything_starts(
    evaluate: Any, folder: Path, arguments: list[str], facts: list[str]
) -> None:
    for name in ("empty", "adapter", "x.parquet"):
        (folder / name).mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "data.csv").write_text("question\n")
    (folder / "spoilt.jsonl").write_text('{"text": "w1 w2"}\n{"words": "w1"}\n')
    (folder / "kinds.jsonl").write_text('{"text": "w1 w2"}\n{"question": "w1", "response": "w2"}\n')
    shutil.copytree(folder / "base", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    weights = tiny.make_model()
    del weights.model.layers[2:]
    weights.config.num_hidden_layers = 2
    assert config["num_hidden_layers"] == 3
    tiny.save(weights, folder / "other")
    before = sorted(folder.rglob("*"))
    refused(evaluate(*arguments), facts, prepared=True)
    assert sorted(folder.rglob("*")) == before


def test_no_cluster_at_an_address(evaluate: Any, folder: Path) -> None:
    ended = evaluate("base", "--data", "answers.jsonl", "--address", "127.0.0.1:1")
    assert ended.code == 3 and "127.0.0.1:1" in ended.stderr and "Traceback" not in ended.stderr
    assert not (folder / "evaluation.parquet").exists()


def test_cpus_of_a_task_on_ray() -> None:
    two, none = Node(8, 2), Node(16, 0)
    assert task_cpus([two, none], 1, 2) == 4 and task_cpus([two, none], 1, 1) == 8
    assert task_cpus([two, none], 0, 2) == 8 and task_cpus([Node(4, 0)], 0, 9) == 1
    with errors.refused(ClusterError, where="cluster", do="--num-gpus", facts=["4 GPUs", " 2"]):
        task_cpus([two, none], 4, 1)


def test_files_of_a_model_go_apart_where_gpus_are_free() -> None:
    data = tuple(DataSet(name, (make_item(Record("", {"text": "w1"}, 1.0)),)) for name in "abc")
    jobs = [EvaluationJob(name, ModelName(name), data, Tasks(("toy",)), Options()) for name in ("m", "n")]

    def apart(nodes: Sequence[Node], gpus: int) -> list[tuple[str, str, int]]:
        return [(j.name, "".join(d.name for d in j.data), len(j.tasks.names)) for j in spread(jobs, gpus, nodes)]

    whole = [("m", "abc", 1), ("n", "abc", 1)]
    assert apart([Node(8, 0)], 0) == apart([Node(8, 3)], 1) == apart([Node(8, 4)], 2) == whole
    halves = [("m", "ac", 1), ("m", "b", 0), ("n", "ac", 1), ("n", "b", 0)]
    assert apart([Node(8, 2), Node(8, 2)], 1) == halves
    assert len(apart([Node(8, 64)], 1)) == 6, "no task without data"


# lm-evaluation-harness.


def test_rows_of_the_harness() -> None:
    results = {
        "results": {
            "one": {
                "alias": "one",
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "exact_match,strict": 1,
                "bleu,none": "N/A",
            },
            "both": {"alias": "both", "acc,none": 0.25},
        },
        "group_subtasks": {"both": ["one", "two"], "one": []},
        "n-samples": {"one": {"original": 9, "effective": 4}, "two": {"original": 3, "effective": 2}},
    }
    assert list(rows_of("m", results)) == [
        Row("m", "one", "acc", 0.5, 4),
        Row("m", "one", "acc_stderr", 0.1, 4),
        Row("m", "one", "exact_match,strict", 1.0, 4),
        Row("m", "both", "acc", 0.25, 6),
    ]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="the extra `eval` is not installed")
def test_tasks_of_the_harness(folder: Path) -> None:
    lines = [{"question": f"w{i}", "choices": ["w3", "w4"], "answer": i % 2} for i in range(3)]
    (folder / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks").mkdir()
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "toy.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks" / "toy.yaml").write_text(json.dumps(task))
    options = ("--task", "toy", "--task-path", "tasks", "--limit", "2", "--max-new-tokens", "3")
    done = cli("base", "--data", "answers.jsonl", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = scores(folder / "evaluation.parquet")
    assert rows["base", "toy", "acc"][1] == 2 and rows["base", "answers", "f1"][1] == 2
    unknown = cli("base", "--task", "nothing", "--task-path", "tasks", cwd=folder)
    assert unknown.returncode == 2 and "error: --task: " in unknown.stderr and "'nothing'" in unknown.stderr
