"""What Ray prints goes to the run's log, and everything else to the terminal."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private import worker

import cluster.ray_log
from cluster.ray_log import ray_log

OF_RAY = [
    "[2026-11-30 16:45:27,123 E 4021 4055] gcs_rpc_client.h:151: Failed to connect to GCS at 10.0.0.1:6379",
    "*** SIGTERM received at time=1700000000 on cpu 1 ***",
    "E1130 16:45:27.123456 4021 chttp2_server.cc:1063] UNKNOWN: No address added",
]


def output(line: str) -> dict[str, object]:
    """Return a line of an actor as Ray delivers it."""
    return {"lines": [line], "pid": 7, "ip": "10.0.0.2", "actor_name": "shard-0", "is_err": True, "job": "01"}


def test_lines_of_ray_are_in_the_file_and_others_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with ray_log(tmp_path / "log", said.append):
        os.write(2, "\n".join([*OF_RAY, "a warning of a library", ""]).encode())
        logging.getLogger("ray").error("a worker died")
        worker.print_to_stdstream(output("CUDA error"), ignore_prefix=False)
    os.write(2, b"after\n")
    log = (tmp_path / "log").read_text()
    assert all(line in log for line in (*OF_RAY, "a worker died", "CUDA error"))
    assert "shard-0" in log and "10.0.0.2" in log
    assert said == ["a warning of a library"]
    assert capfd.readouterr().err == "after\n"


def test_the_file_is_bounded_and_absent_without_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray_log, "MOST_BYTES", 1000)
    with ray_log(tmp_path / "log", print):
        assert not (tmp_path / "log").exists()
        for number in range(100):
            logging.getLogger("ray").error("line %d", number)
    assert "line 99" in (tmp_path / "log").read_text()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2000
    assert {file.name for file in tmp_path.iterdir()} == {"log", "log.1"}


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ray_log(tmp_path / "file" / "log", print):
        logging.getLogger("ray").error("lost")
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.slow
def test_the_terminal_is_clean_while_actors_print_and_die(tmp_path: Path) -> None:
    code = """
import os, sys, time, ray
from pathlib import Path
from cluster.session import connect

@ray.remote(max_restarts=1, max_task_retries=1)
class Actor:
    def __init__(self):
        print("an actor starts", flush=True)
    def work(self, file):
        if not os.path.exists(file):
            open(file, "w").close()
            os.kill(os.getpid(), 9)

log = Path(sys.argv[1])
with connect(None, False, log):
    ray.get(Actor.remote().work.remote(sys.argv[1] + ".died"))
    until = time.monotonic() + 30
    while log.read_text().count("an actor starts") < 2 and time.monotonic() < until:
        time.sleep(0.1)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")
    assert (tmp_path / "log").read_text().count("an actor starts") == 2
