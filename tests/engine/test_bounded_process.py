"""Child processes with limits: answers, errors of the input, and work that exceeds a limit or crashes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from errors import refused
from psutil import STATUS_ZOMBIE, NoSuchProcess, Process

import engine.bounded_process
from engine.bounded_process import BoundedProcess, bounded
from engine.errors import CalibrationError, CheckpointError, InputError, MergeError


def ended(pid: int) -> bool:
    try:
        return Process(pid).status() == STATUS_ZOMBIE
    except NoSuchProcess:
        return True


def fault(fails: str) -> InputError:
    return CheckpointError(f"it {fails}", "here")


class Counter:
    """An object with a state, whose methods a test calls in a child."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> tuple[Any, bytes]:
        self.count += number
        return {"count": self.count, "process": os.getpid()}, bytes(self.count)

    def refuse(self) -> tuple[Any, bytes]:
        raise CalibrationError("no", "a:1", "yes", "say yes")


def test_an_object_in_a_child_answers_and_keeps_its_state() -> None:
    with BoundedProcess(Counter, fault) as process:
        answers = [process.call("add", number, fault=fault) for number in (1, 2)]
    assert [(value["count"], content) for value, content in answers] == [(1, bytes(1)), (3, bytes(3))]
    (child,) = {value["process"] for value, _ in answers}
    assert child != os.getpid() and ended(child)


def test_a_child_goes_on_after_an_error_of_the_input() -> None:
    with BoundedProcess(Counter, fault) as process:
        with refused(CalibrationError, where="a:1", do="say yes") as caught:
            process.call("refuse", fault=fault)
        assert caught.value.args == ("no", "a:1", "yes", "say yes")
        assert process.call("add", 5, fault=fault)[1] == bytes(5)


def test_an_error_while_the_object_is_made_ends_the_child() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    with refused(CheckpointError, where="b"):
        bounded(lambda: refuse("b"), fault)
    assert children.read_text() == before


def refuse(where: str) -> None:
    raise CheckpointError("no", where)


def spin() -> None:
    while True:
        pass


def in_native_code() -> None:
    # Holds the interpreter's lock, so that no signal handler of Python runs.
    ctypes.PyDLL(None).pause()


def fill() -> None:
    parts = []
    while True:
        parts.append(bytes(64 << 20))


def abort() -> None:
    print("thread 'x' panicked", file=sys.stderr, flush=True)
    os.abort()


def abort_without_memory() -> None:
    os.write(2, b"memory allocation of 99 bytes failed\nstack backtrace:\n")
    os.abort()


@pytest.mark.parametrize(
    ("work", "fact"),
    [
        (spin, "CPU seconds"),
        (in_native_code, "gives no answer for 1 seconds"),
        (fill, "GiB of memory"),
        (abort_without_memory, "GiB of memory"),
        (abort, "SIGABRT: thread 'x' panicked"),
        (lambda: ctypes.string_at(0), "SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: "x" * 2000, "answers with more than 1,000 bytes"),
    ],
)
def test_work_beyond_a_limit_or_that_crashes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], work: Callable[[], Any], fact: str
) -> None:
    # Short times only where they decide: on a busy machine, any work may take longer.
    limits: dict[str, float] = {"MEMORY": 256 << 20, "ANSWER": 1000}
    if work is spin:
        limits["SECONDS"] = 0.2
    elif work is in_native_code:
        limits["SILENCE"] = 1
    for name, value in limits.items():
        monkeypatch.setattr(engine.bounded_process, name, value)
    with refused(CheckpointError, where="here", facts=[fact]):
        bounded(work, fault)
    assert capfd.readouterr() == ("", "")


def test_a_limit_is_for_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.bounded_process, "SECONDS", 0.3)

    class Busy:
        def work(self) -> tuple[Any, bytes]:
            end = time.process_time() + 0.15
            while time.process_time() < end:
                pass
            return None, b""

    with BoundedProcess(Busy, fault) as process:
        for _ in range(4):
            process.call("work", fault=fault)


def test_a_file_that_a_child_writes_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine.bounded_process, "FILE_BYTES", 1000)

    def write() -> bool:
        try:
            (tmp_path / "a").write_bytes(bytes(5000))
        except OSError:
            return False
        return True

    assert bounded(write, fault) is False
    assert (tmp_path / "a").stat().st_size <= 1000


def test_a_fault_of_our_own_code_is_no_error_of_the_input() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as caught:
        bounded(lambda: 1 // 0, fault)
    assert not isinstance(caught.value, MergeError)


def test_a_child_is_made_in_any_thread() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(bounded, lambda: 7, fault).result() == 7


def test_a_busy_child_does_not_outlive_its_parent() -> None:
    script = (
        "import os\n"
        "from engine.bounded_process import bounded\n"
        "shown = os.dup(1)\n"
        "def work():\n"
        "    os.write(shown, str(os.getpid()).encode())\n"
        "    os.kill(os.getppid(), 9)\n"
        "    while True: pass\n"
        "bounded(work, ValueError)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    end = time.monotonic() + 20
    while not ended(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert ended(child)
