"""Merges without Ray: the shards are processes of this machine, which may end, hang or fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_helpers import result, run_merge
from conftest import plan_of
from errors import refused
from psutil import pid_exists
from thorough import as_thorough

from actors.shard import Shard
from cluster.driver import needs_ray
from cluster.processes import OneMachine, ProcessWatch, ShardProcess
from cluster.watch import TRIES, Hung, until_done
from engine.errors import CheckpointError, RunError
from engine.planning.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
LINEAR = ("merge_method=linear", "max_shard_size=20KB")


@pytest.fixture(scope="module")
def plan(llama_merge: Path) -> Plan:
    return plan_of(llama_merge, *LINEAR)


@pytest.fixture(scope="module")
def merged(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed merge, with one shard."""
    return run_merge(plan, tmp_path_factory.mktemp("out") / "merged", hosts=OneMachine())


class Strike:
    """A callback for `run_merge` that sends a signal to the processes of all shards, once or each time."""

    def __init__(self, number: signal.Signals, times: int = 1) -> None:
        self.number, self.times, self.struck = number, times, list[int]()

    def __call__(self, phase: str) -> None:
        if phase == "writing" and self.times:
            self.times -= 1
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, self.number)
                self.struck.append(child.pid)


def test_shards_that_are_killed_are_replaced_with_the_same_bits(
    llama_merge: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strike = Strike(signal.SIGKILL)
    other = run_merge(plan_of(llama_merge, *LINEAR, "cluster.shards=2"), tmp_path / "out", strike, OneMachine())
    assert result(other) == result(merged) and len(strike.struck) == 2
    printed = capsys.readouterr().out
    assert printed.count("SIGKILL") == 1 and "weight files kept" in printed
    memory = json.loads((other / "merge" / "memory.json").read_text())
    assert [actor["role"] for actor in memory["actors"]] == ["driver", "shard 0", "shard 1"]
    assert len({actor["pid"] for actor in memory["actors"]}) == 3
    assert all(actor["peak_anonymous_bytes"] > 0 for actor in memory["actors"])
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_shard_that_hangs_is_named_and_replaced_with_the_same_bits(
    llama_merge: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strike = Strike(signal.SIGSTOP)
    other = run_merge(plan_of(llama_merge, *LINEAR, "cluster.hang=6"), tmp_path / "out", strike, OneMachine())
    assert result(other) == result(merged)
    # On a busy machine, a shard that does not hang may be as silent.
    lines = [line for line in capsys.readouterr().out.splitlines() if "hangs" in line]
    assert lines and "shard 0" in lines[0] and not any(map(pid_exists, strike.struck))


def shard_that(does: Callable[[], Any], debug: bool = False) -> Any:
    """A started process with a shard whose `report` does something else."""

    class Other(Shard):
        def report(self) -> Any:
            return does()

    process = ShardProcess("shard 0", lambda: Other.__new__(Other), debug)
    process.start()
    return process


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("does", "kind", "do", "fact"),
    [
        (lambda: fail(CheckpointError("NaN", "x.safetensors")), CheckpointError, "", "x.safetensors"),
        (lambda: fail(KeyError("x")), RunError, "--debug", "KeyError: 'x'"),
        (lambda: os._exit(3), RunError, "free memory", "code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), RunError, "--debug", "SIGSEGV"),
    ],
    ids=["of the project", "of Python", "an exit", "a signal"],
)
def test_what_ends_a_run(does: Callable[[], Any], kind: type[RunError | CheckpointError], do: str, fact: str) -> None:
    attempts: list[int] = []

    def attempt() -> Any:
        attempts.append(1)
        process = shard_that(does)
        try:
            return ProcessWatch(print).answer(process.report.remote(), "merging")
        finally:
            process.end()

    with refused(kind, do=do, facts=[fact]):
        until_done(attempt, lambda: "here", print)
    assert len(attempts) == (1 if "code" not in fact and "SIG" not in fact else TRIES)


@pytest.mark.parametrize("debug", [False, True])
def test_with_debug_a_process_prints_to_the_terminal(debug: bool, capfd: pytest.CaptureFixture[str]) -> None:
    process = shard_that(lambda: os.write(2, b"out of luck") and fail(KeyError("x")), debug)
    with refused(RunError, do="--debug"):
        ProcessWatch(print).answer(process.report.remote(), "merging")
    process.end()
    shown = capfd.readouterr().err
    assert ("out of luck" in shown) == ("Traceback" in shown) == debug


def test_answers_come_in_the_order_of_the_calls_and_silence_has_a_name() -> None:
    process = shard_that(lambda: signal.pause())
    watch = ProcessWatch(print)
    watch.on(process, "", process.name)
    try:
        first, second = process.forget.remote(), process.forget.remote()
        assert watch.answer(second, "forgetting") is watch.answer(first, "forgetting") is None
        watch.patience = 0.1
        with pytest.raises(Hung, match="shard 0"):
            watch.answer(process.report.remote(), "waiting")
    finally:
        process.end()


def test_ray_is_used_where_a_cluster_or_object_storage_is_asked_for(
    llama_merge: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not needs_ray(plan, "/out", None)
    assert needs_ray(plan, "/out", "local") and needs_ray(plan, "s3://bucket/out", None)
    assert needs_ray(plan_of(llama_merge), "/out", None), "it learns"
    assert needs_ray(plan_of(llama_merge, *LINEAR, "cluster.labels={zone: a}"), "/out", None)
    assert needs_ray(plan_of(llama_merge, *LINEAR, "tokenizer_source=base"), "/out", None) is False
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert needs_ray(plan, "/out", None)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("number", [signal.SIGTERM, as_thorough(signal.SIGINT), as_thorough(signal.SIGKILL)])
def test_a_stopped_merge_leaves_no_process_and_is_resumed(
    llama_merge: Path, merged: Path, tmp_path: Path, number: signal.Signals
) -> None:
    options = [word for option in (*LINEAR, "log_dir=" + str(tmp_path)) for word in ("--set", option)]
    command = [sys.executable, ROOT / "cli.py", "merge", llama_merge, "--out", tmp_path / "out", *options]
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "WARM_SERVER")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if "writing 1/" in line:
                run.send_signal(number)
                break
        # Standard output is that of the shards, too, so its end is theirs.
        run.stdout.read()
        message = run.stderr.read()
    assert run.returncode == (-number if number == signal.SIGKILL else 130) and "Traceback" not in message
    again = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "weight files kept" in again.stdout and not (tmp_path / "out.run").exists()
    assert result(tmp_path / "out") == result(merged)
