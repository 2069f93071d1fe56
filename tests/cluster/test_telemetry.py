"""Telemetry of a running merge: the gauges that Ray exports, and experiment trackers."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet
import pytest
import tiny
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from conftest import LONG, plan_of
from errors import refused
from ray_head import ROOT, started_head
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cluster.telemetry
from cluster.telemetry import Telemetry, check_trackers
from engine.config.schema import TRACKERS, Config
from engine.errors import ConfigError, RunError
from engine.run.inputs import identity

Logged = list[tuple[int, dict[str, float]]]


def config(*log_with: str, **keys: Any) -> Config:
    models = [{"model": "expert", "calibration": "expert.jsonl"}]
    given = {"merge_method": "expert_merging", "base_model": "base", "models": models, "log_with": log_with, **keys}
    return Config.model_validate(given)


def rows(stage: int, step: int, *losses: float, **more: float) -> list[dict[str, Any]]:
    """Rows of merge/metrics.parquet, one for each value of the kl loss; the hidden loss is twice as large."""
    whole = {"regularization": 0.1, "grad_norm": 0.2, "learning_rate": 0.3, "seconds": 1.5}
    where = {"stage": stage, "step": step, "model": "expert", "entropy": None}
    return [where | {"sample": i, "kl": loss, "hidden": 2 * loss} | whole | more for i, loss in enumerate(losses)]


class FakeGauge:
    """Stands in for Ray's gauge. Stores values by name and tags; `heard` is called with the name at every `set`."""

    values: dict[tuple[str, tuple[str, ...]], float]
    heard: Callable[[str], None]

    def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> None:
        assert about
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        FakeGauge.values[self.name, tuple(tags[key] for key in self.tag_keys)] = value
        FakeGauge.heard(self.name)


@pytest.fixture(autouse=True)
def gauges(monkeypatch: pytest.MonkeyPatch) -> type[FakeGauge]:
    FakeGauge.values, FakeGauge.heard = {}, lambda name: None
    monkeypatch.setattr(cluster.telemetry, "Gauge", FakeGauge)
    return FakeGauge


class FakeTracker:
    """A tracker with the interface of accelerate's."""

    made: list[FakeTracker]

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options = project, options
        self.logged: Logged = []
        self.running = False
        FakeTracker.made.append(self)

    def start(self) -> None:
        self.running = True

    def log(self, values: dict[str, float], step: int) -> None:
        assert self.running
        self.logged.append((step, values))

    def finish(self) -> None:
        self.running = False


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTracker]:
    """The trackers that are created in place of wandb and trackio."""
    FakeTracker.made = []
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, FakeTracker)
    return FakeTracker.made


def test_the_names_are_accelerates() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_a_tracker_that_is_not_installed_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.telemetry, "get_available_trackers", lambda: ["tensorboard"])
    check_trackers(config("tensorboard"), "out")
    with refused(ConfigError, "log_with", "pip install wandb mlflow"):
        check_trackers(config("wandb", "tensorboard", "mlflow"), "out")


def test_files_beside_an_output_that_is_no_folder_need_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster.telemetry, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    check_trackers(config("wandb"), "s3://bucket/out")
    check_trackers(config("tensorboard", log_dir=str(tmp_path)), "s3://bucket/out")
    with refused(ConfigError, "log_with", "log_dir", facts=["tensorboard", "s3://bucket/out"]):
        check_trackers(config("wandb", "tensorboard"), "s3://bucket/out")


@pytest.mark.parametrize("given", ["tensorbord", "[wandb, nobody]", "3", "{wandb: 1}"])
def test_a_name_that_accelerate_does_not_have_is_a_fault_of_the_config(llama_merge: Path, given: str) -> None:
    with refused(ConfigError, facts=["log_with", *TRACKERS]):
        plan_of(llama_merge, f"log_with={given}")


def test_one_name_or_a_list(llama_merge: Path) -> None:
    assert plan_of(llama_merge).config.log_with == ()
    assert plan_of(llama_merge, "log_with=wandb").config.log_with == ("wandb",)
    assert plan_of(llama_merge, "log_with=[wandb, mlflow]").config.log_with == ("wandb", "mlflow")


def test_who_is_told_does_not_make_another_merge(llama_merge: Path, tmp_path: Path) -> None:
    told = plan_of(llama_merge, "log_with=tensorboard", f"log_dir={tmp_path}")
    assert not identity(told).differences(identity(plan_of(llama_merge)))


def test_steps_of_stage_2_are_numbered_on_after_those_of_stage_1(trackers: list[FakeTracker]) -> None:
    with Telemetry("merged-1", config("wandb"), "out") as telemetry:
        for stage in (1, 2):
            telemetry.phase(f"stage {stage}", 2)
            for step in (0, 1):
                telemetry.step(rows(stage, step, 1.0, 4.0))
    (tracker,) = trackers
    assert tracker.options == {"id": "merged-1", "name": "merged-1", "resume": "allow"} and not tracker.running
    whole = {"regularization": 0.1, "grad_norm": 0.2, "learning_rate": 0.3, "step_seconds": 1.5}
    assert tracker.logged == [(number, {"kl": 2.5, "hidden": 5.0, **whole}) for number in range(4)]


def test_what_is_no_steps_own_goes_with_the_next_or_the_last(trackers: list[FakeTracker]) -> None:
    with Telemetry("merged-1", config("wandb"), "out") as telemetry:
        telemetry.phase_seconds("reading every weight once", 2.5)
        telemetry.phase("stage 1", 9, 3)
        telemetry.step(rows(1, 3, 1.0))
        telemetry.bytes("targets", 100)
        telemetry.phase_seconds("writing", 7.0)
    assert [number for number, _ in trackers[0].logged] == [3, 3]
    assert trackers[0].logged[0][1]["seconds/reading_every_weight_once"] == 2.5
    assert trackers[0].logged[1][1] == {"bytes/targets": 100, "seconds/writing": 7.0}


def test_a_run_that_goes_on_without_a_step_logs_at_its_last(trackers: list[FakeTracker]) -> None:
    with Telemetry("merged-1", config("wandb"), "out") as telemetry:
        telemetry.phase("stage 1", 4, 4)
        telemetry.phase("stage 2", 4, 4)
        telemetry.phase_seconds("writing", 7.0)
    assert trackers[0].logged == [(7, {"seconds/writing": 7.0})]


def test_without_ray_there_are_trackers_alone(trackers: list[FakeTracker]) -> None:
    with Telemetry("merged-1", config("wandb"), "out", gauges=False) as telemetry:
        telemetry.phase("writing", 2)
        telemetry.phase_seconds("writing", 7.0)
    assert trackers[0].logged == [(0, {"seconds/writing": 7.0})] and not FakeGauge.values


def test_a_merge_without_targets_has_an_entropy_alone(trackers: list[FakeTracker]) -> None:
    nothing: dict[str, Any] = {"kl": None, "hidden": None}
    with Telemetry("merged-1", config("wandb"), "out") as telemetry:
        telemetry.phase("stage 1", 1)
        telemetry.step([row | nothing | {"entropy": 3.0} for row in rows(1, 0, 1.0, 1.0)])
    values = trackers[0].logged[0][1]
    assert values["entropy"] == 3.0 and not {"kl", "hidden"} & set(values)


def test_a_tracker_that_fails_ends_the_run_and_all_are_finished(
    trackers: list[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(values: dict[str, float], step: int) -> None:
        raise TimeoutError("no answer")

    def run() -> None:
        with Telemetry("merged-1", config("wandb", "trackio"), "out") as telemetry:
            telemetry.phase("stage 1", 1)
            monkeypatch.setattr(trackers[1], "log", fail)
            telemetry.step(rows(1, 0, 1.0))

    with refused(RunError, "log_with", facts=["trackio", "TimeoutError: no answer"]):
        run()
    assert [tracker.running for tracker in trackers] == [False, False]


def test_a_tracker_that_does_not_start_is_a_fault_of_the_config(
    trackers: list[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoKey(FakeTracker):
        def start(self) -> None:
            raise PermissionError("no key")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", NoKey)
    with (
        refused(ConfigError, "log_with", facts=["trackio", "PermissionError: no key"]),
        Telemetry("merged-1", config("wandb", "trackio"), "out"),
    ):
        raise AssertionError("the tracker was started")
    assert [tracker.running for tracker in trackers] == [False, False]


def test_a_run_that_goes_on_does_so_in_the_same_tensorboard_run(tmp_path: Path) -> None:
    def run(first: int, last: int) -> None:
        with Telemetry("merged-1", config("tensorboard"), str(tmp_path / "out")) as telemetry:
            for stage in (1, 2):
                before = 3 * (stage - 1)
                steps = range(*(min(max(number - before, 0), 3) for number in (first, last)))
                telemetry.phase(f"stage {stage}", 3, steps.start)
                for step in steps:
                    telemetry.step(rows(stage, step, 1.0 / (1 + before + step)))

    run(0, 4)
    run(4, 6)
    kept = read_tensorboard(tmp_path / "out.logs" / "merged-1")
    assert set(kept) == {"kl", "hidden", "regularization", "grad_norm", "learning_rate", "step_seconds"}
    assert kept["kl"] == [(number, pytest.approx(1.0 / (1 + number))) for number in range(6)]


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_gauges_say_where_a_run_stands(gauges: type[FakeGauge]) -> None:
    with Telemetry("merged-1", config(), "out") as telemetry:
        telemetry.phase("targets", 7, 2)
        telemetry.phase("stage 2", 3)
        telemetry.advance("targets", 5)
        telemetry.step(rows(2, 0, 1.0, 4.0))
        telemetry.advance("stage 2", 1)
        telemetry.phase_seconds("targets", 2.5)
        telemetry.bytes("trainer_to_shards", 2**40)
    of_stage = {"step": 0, "kl": 2.5, "hidden": 5.0, "regularization": 0.1, "grad_norm": 0.2, "learning_rate": 0.3}
    expected = {(name, "2"): value for name, value in {**of_stage, "step_seconds": 1.5}.items()} | {
        ("phase_parts", "targets"): 7,
        ("phase_parts_done", "targets"): 5,
        ("phase_parts", "stage 2"): 3,
        ("phase_parts_done", "stage 2"): 1,
        ("phase_seconds", "targets"): 2.5,
        ("bytes", "trainer_to_shards"): 2**40,
    }
    assert gauges.values == {(f"expert_merging_{n}", ("merged-1", tag)): v for (n, tag), v in expected.items()}


def test_gauges_are_set_again_while_nothing_happens(gauges: type[FakeGauge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.telemetry, "REPEAT_SECONDS", 0.001)
    with Telemetry("merged-1", config(), "out") as telemetry:
        telemetry.phase("targets", 7)
        again = threading.Event()
        gauges.heard = lambda name: again.set()
        assert again.wait(LONG)
    assert gauges.values["expert_merging_phase_parts", ("merged-1", "targets")] == 7


SAMPLE = re.compile(r"^ray_expert_merging_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def scraped(metrics: str) -> dict[tuple[str, str], float]:
    """The gauges on a metrics port, by their name and the value of the tag other than `run`."""
    with urllib.request.urlopen(f"{metrics}/metrics", timeout=LONG) as answer:
        page = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for name, tags, value in SAMPLE.findall(page):
        tag = re.search(r'(?:^|,)(?:stage|phase|direction)="([^"]*)"', tags)
        assert tag is not None, tags
        found[name, tag[1]] = float(value)
    return found


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.usefixtures("warm")
def test_a_real_metrics_port_and_tensorboard_show_a_merge_that_was_stopped_once(tmp_path: Path) -> None:
    merge = tiny.make_merge(tmp_path / "merge", log_with="tensorboard", parameters={"epochs": 6})
    out = tmp_path / "out"
    with started_head() as head:
        command = [sys.executable, ROOT / "cli.py", "merge", merge, "--out", out, "--address", head.address]
        stop_at(command, head.environment, "stage 1 3/")
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=300, check=False)
        seen = scraped(head.metrics)
    assert done.returncode == 0, done.stderr
    rows = pyarrow.parquet.read_table(out / "merge" / "metrics.parquet").to_pylist()
    last = max(row["step"] for row in rows)
    for stage in (1, 2):
        mine = [row for row in rows if (row["stage"], row["step"]) == (stage, last)]
        expected = {key: fmean(row[key] for row in mine) for key in ("kl", "hidden")}
        expected |= {key: mine[0][key] for key in ("step", "regularization", "grad_norm", "learning_rate")}
        assert {key: seen[key, str(stage)] for key in expected} == pytest.approx(expected)
        assert seen["phase_parts_done", f"stage {stage}"] == seen["phase_parts", f"stage {stage}"] == last + 1
    assert seen["phase_parts_done", "targets"] == 7 and seen["phase_seconds", "writing"] > 0
    assert {tag for name, tag in seen if name == "bytes"}, "bytes moved, by direction"
    (run,) = (tmp_path / "out.logs").iterdir()
    numbers = [number for number, _ in read_tensorboard(run)["kl"]]
    # The run may be stopped after a step's state was stored and before the step was logged.
    missing = set(range(2 * (last + 1))) - set(numbers)
    assert numbers == sorted(set(numbers)) and len(missing) <= 1


def stop_at(command: Sequence[Any], environment: dict[str, str], line: str) -> None:
    """Start a command, send it SIGTERM when `line` occurs in its output, and check its exit code."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    said: list[str] = []
    with subprocess.Popen(command, env=environment, **pipes) as run:
        assert run.stdout is not None
        for one in run.stdout:
            said.append(one)
            if line in one:
                run.terminate()
    assert run.returncode == 130, "".join(said)
