"""Searches through the command line, on a real Ray: the output, losses of the driver and of processes, and nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import yaml
from errors import refused
from processes import descendants, kill, marked, new_mark, titled

from cluster.search import search
from engine.config.documents import read_documents
from engine.errors import OutputError
from engine.search.record import read_trials
from engine.storage.local_folder import LocalFolder

ROOT = Path(__file__).resolve().parents[2]
KEY = "models.*.parameters.weight"
KEYS = [f"models.{k}.parameters.weight" for k in range(2)]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    tiny.make_merge(work)
    declare(work)
    return work


def declare(folder: Path, **settings: Any) -> None:
    models = [
        {"model": f"expert{k}", "calibration": f"expert{k}.jsonl", "parameters": {"weight": 0.5}} for k in range(2)
    ]
    raw: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    raw["search"] = {"space": {KEY: {"low": 0, "high": 1}}, "trials": 12, "parallel": 1} | settings
    (folder / "search.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


def started(*arguments: object, cwd: Path, mark: dict[str, str] | None = None) -> subprocess.Popen[str]:
    # A command that gets a mark is to be killed, and is therefore the process itself and not a fork of the server.
    without = ("RAY_ADDRESS", "WARM_SERVER") if mark else ("RAY_ADDRESS",)
    environment = {key: value for key, value in os.environ.items() if key not in without} | {"COLUMNS": "200"}
    command = [sys.executable, ROOT / "cli.py", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment | (mark or {}), **pipes)


def cli(*arguments: object, cwd: Path, code: int = 0) -> str:
    process = started(*arguments, cwd=cwd)
    out, error = process.communicate(timeout=240)
    assert process.returncode == code, out + error
    return out + error


def rows(out: Path) -> list[dict[str, Any]]:
    return list(pyarrow.parquet.read_table(out / "trials.parquet").to_pylist())


def values(out: Path) -> list[dict[str, Any]]:
    return [trial.values for trial in read_trials(LocalFolder(out))]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_search_finds_and_writes_the_best_and_goes_on_with_more_trials(folder: Path) -> None:
    planned = cli("plan", "search.yaml", cwd=folder)
    # 12 trials on the 4 and 3 records of the experts.
    assert all(fact in planned for fact in ("12 merges", "tpe", KEYS[0], "kl on 4 records", "kl on 3 records", "84"))
    printed = cli("search", "search.yaml", "--out", "found", cwd=folder)
    out = folder / "found"
    table = rows(out)
    assert [row["number"] for row in table] == list(range(12))
    assert [table[0][key] for key in KEYS] == [0.5, 0.5], "the config itself comes first"
    best = next(row for row in table if row["best"])
    assert best["score"] == min(row["score"] for row in table) < table[0]["score"]
    assert best["score"] == pytest.approx((best["metric expert0: kl"] + best["metric expert1: kl"]) / 2)
    assert "12 done" in printed and f"{best['score']:.5g}" in printed
    # What is written is what `merge` makes of the best trial's config.
    cli("merge", out / "best.yaml", "--out", "again", cwd=folder)
    assert weights(folder / "again") == weights(out / "merged")
    config = yaml.safe_load((out / "best.yaml").read_text())
    assert [model["parameters"]["weight"] for model in config["models"]] == [best[key] for key in KEYS]

    # The same command has nothing left to do; more trials are added to these.
    before, stamp = values(out), (out / "merged" / "model.safetensors").stat().st_mtime_ns
    cli("search", "search.yaml", "--out", "found", cwd=folder)
    assert values(out) == before and (out / "merged" / "model.safetensors").stat().st_mtime_ns == stamp
    cli("search", "search.yaml", "--out", "found", "--set", "search.trials=15", cwd=folder)
    assert values(out)[:12] == before and len(values(out)) == 15
    # Another search is not mixed with it.
    declare(folder, algorithm="random", trials=2)
    message = cli("search", "search.yaml", "--out", "found", cwd=folder, code=2)
    assert "search.algorithm" in message and "--fresh" in message
    (out / "notes.txt").write_text("mine")
    cli("search", "search.yaml", "--out", "found", "--fresh", cwd=folder)
    assert len(values(out)) == 2 and (out / "notes.txt").exists()


def test_a_search_goes_on_after_the_driver_was_killed(folder: Path) -> None:
    declare(folder, trials=25)
    cli("search", "search.yaml", "--out", "whole", cwd=folder)
    mark, out = new_mark(), folder / "killed"
    process = started("search", "search.yaml", "--out", "killed", cwd=folder, mark=mark)
    try:
        wait_for(lambda: len(list((out / "trials").glob("*.json"))) >= 5 or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    finally:
        process.communicate()
        kill(marked(mark))
    kept = values(out)
    assert 5 <= len(kept) < 25 and not (out / "merged").exists()
    cli("search", "search.yaml", "--out", "killed", cwd=folder)
    # With one trial at a time, all are as if nothing had happened.
    assert values(out)[: len(kept)] == kept
    assert values(out) == values(folder / "whole")
    assert weights(out / "merged") == weights(folder / "whole" / "merged")


def test_a_process_that_is_lost_is_replaced(folder: Path) -> None:
    declare(folder, trials=60)
    process = started("search", "search.yaml", "--out", "found", cwd=folder)
    wait_for(lambda: len(list((folder / "found" / "trials").glob("*.json"))) >= 3 or process.poll() is not None)
    # Ray Tune's name of the process while it works, and its own while it waits.
    names = ("ray::ResourceTrainable", "ray::TrialProcess")
    below = [inner for each in descendants(process.pid) for inner in descendants(each.pid)]
    lost = [each for name in names for each in titled(name, below)]
    assert lost
    kill(lost)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, out + error
    assert [row["state"] for row in rows(folder / "found")] == ["done"] * 60


@pytest.mark.usefixtures("small_ray")
def test_merges_that_cannot_be_scored_fail_alone_and_rungs_end_others(folder: Path) -> None:
    # Some weights make values that are not finite.
    space = {KEY: {"low": 1e-3, "high": 1e39, "log": True}}
    declare(folder, space=space, trials=24, rungs=2, algorithm="random", parallel=2)
    printed: list[Any] = []
    search(read_documents(folder / "search.yaml")[0], str(folder / "found"), print_table=printed.append)
    (table,) = printed
    assert table == rows(folder / "found")
    assert {row["state"] for row in table} == {"done", "stopped", "failed"}
    assert all(row["why"] for row in table if row["state"] == "failed")
    assert {row["rungs"] for row in table if row["state"] == "stopped"} == {1}


def test_a_folder_of_something_else_is_not_touched(folder: Path) -> None:
    document = read_documents(folder / "search.yaml")[0]
    (folder / "own").mkdir()
    (folder / "own" / "notes.txt").write_text("mine")
    for fresh in (False, True):
        with refused(OutputError, "own", facts=["notes.txt"]):
            search(document, str(folder / "own"), fresh=fresh)
    assert [path.name for path in (folder / "own").iterdir()] == ["notes.txt"]
