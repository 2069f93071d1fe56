"""A process forked by the warm server is to others what a process started afresh would be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import descendants

# The server serves any script of this name.
SCRIPT = """
import json, os, signal, sys, time
print(json.dumps([sys.argv, os.getcwd(), os.environ["GIVEN"], sys.stdin.read(), os.getpid(), "torch" in sys.modules]))
sys.stdout.flush()
if sys.argv[1] == "wait":
    time.sleep(60)
print("to the other stream", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(warm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIVEN", "a value")
    path = tmp_path / "cli.py"
    path.write_text(SCRIPT)
    return path


def test_it_has_what_it_was_given_and_its_end_is_seen(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, script, "7", "--option"]
    done = subprocess.run(command, cwd=tmp_path, input="typed", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "to the other stream\n")
    arguments, folder, given, typed, _, imported = json.loads(done.stdout)
    assert arguments == [str(script), "7", "--option"]
    assert (folder, given, typed, imported) == (str(tmp_path), "a value", "typed", True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_gets_the_signals_of_the_process_that_asked_for_it(script: Path, number: signal.Signals) -> None:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, script, "wait"], text=True, **pipes) as process:
        assert process.stdout is not None
        pid = json.loads(process.stdout.readline())[4]
        deadline = time.monotonic() + 60
        while not (found := descendants(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (fork,) = found
        assert fork.pid == pid != process.pid
        process.send_signal(number)
        assert process.wait(30) == -number
    assert not fork.is_running()
    assert descendants(process.pid) == []


def test_an_uncaught_exception_is_a_traceback_and_1(script: Path) -> None:
    done = subprocess.run([sys.executable, script, "seven"], input="", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("ValueError") and "Traceback" in done.stderr


def test_without_a_server_the_script_runs_afresh(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARM_SERVER", "/nowhere/socket")
    done = subprocess.run([sys.executable, script, "0"], input="", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)[5] is False
