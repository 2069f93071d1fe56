"""Processes are found and killed by title only among those of one run, whatever else runs on the machine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

import psutil
import pytest
from cluster_helpers import KillOnce
from processes import MARK, descendants, kill, marked, new_mark, titled
from psutil import Process

TITLE = "ray::Trainer"
Start = Callable[..., Process]


def alive(process: Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended between the two calls
        return False


def wait_until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process titled as an actor of Ray is, below this process or, as `foreign`, re-parented to another."""
    found: list[Process] = []

    def started(foreign: bool = False, environment: Mapping[str, str] | None = None) -> Process:
        # A background process of a shell that exits is re-parented.
        last = "echo $!" if foreign else "echo $!; wait"
        script = f"(exec -a {TITLE} sleep 120) > /dev/null & {last}"
        shell = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        assert shell.stdout is not None
        process = Process(int(shell.stdout.readline()))
        found.append(process)
        wait_until(lambda: titled(TITLE, [process]))
        if foreign:
            shell.wait()
        else:
            shells.append(shell)
        shell.stdout.close()
        return process

    shells: list[subprocess.Popen[str]] = []
    yield started
    kill(found)
    for shell in shells:
        shell.wait()


def test_a_foreign_process_with_the_title_of_a_victim_survives(start: Start) -> None:
    own, foreign = start(), start(foreign=True)
    kill_once = KillOnce({"stage 1": TITLE, "stage 2": "ray::Shard"})
    kill_once("targets")
    assert alive(own) and not kill_once.killed
    kill_once("stage 1")
    wait_until(lambda: not alive(own))
    assert kill_once.killed == {"stage 1": [own.pid]} and kill_once.missed == {"stage 2"}
    assert alive(foreign)


def test_a_phase_has_its_victims_killed_once(start: Start) -> None:
    kill_once = KillOnce({"stage 1": TITLE})
    first = start()
    kill_once("stage 1")
    replacement = start()
    kill_once("stage 1")
    assert kill_once.killed == {"stage 1": [first.pid]} and alive(replacement)


def test_only_processes_below_the_given_one_are_found(start: Start) -> None:
    one, other, foreign = start(), start(), start(foreign=True)
    run = one.parent()
    assert run is not None
    assert titled(TITLE, descendants(run.pid)) == [one]
    kill(titled(TITLE, descendants(run.pid)))
    wait_until(lambda: not alive(one))
    assert alive(other) and alive(foreign)
    run.wait()
    assert descendants(run.pid) == []


def test_a_process_that_was_re_parented_is_found_by_the_mark_of_its_run(start: Start) -> None:
    mark = new_mark()
    own, foreign, without = (start(True, {"PATH": "/usr/bin:/bin", **more}) for more in (mark, new_mark(), {}))
    assert own.pid not in {process.pid for process in descendants(psutil.Process().pid)}
    assert titled(TITLE, marked(mark)) == [own] and mark.keys() == {MARK}
    kill(titled(TITLE, marked(mark)))
    wait_until(lambda: not alive(own))
    assert alive(foreign) and alive(without)
    assert marked(mark) == []
