"""Find and signal the processes of one run, and never those of another run or user on the same machine.

A process belongs to a run if it descends from a process that the run started, or if it carries the run's mark, an
environment variable with a unique value. Children inherit the mark, so that it also identifies processes which were
re-parented because what started them has exited. A title such as `ray::Trainer` only selects among these processes.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from psutil import AccessDenied, NoSuchProcess, Process, process_iter

MARK = "EXPERT_MERGING_TEST_RUN"


def new_mark() -> dict[str, str]:
    """An environment variable with a value that no other run has, to be added to the environment of a command."""
    return {MARK: secrets.token_hex(16)}


def descendants(pid: int) -> list[Process]:
    """All processes below `pid`, without `pid` itself; none if it has exited.

    A process that runs in a fork of the server of `warm_processes` is below the process that asked the server for it.
    """
    try:
        process = Process(pid)
        found = process.children(recursive=True)
    except NoSuchProcess:
        return []
    return [*found, *(fork for each in (process, *found) for fork in _forked_for(each))]


def _forked_for(process: Process) -> list[Process]:
    """The process that the server forked for `process`, and its descendants."""
    with suppress(KeyError, FileNotFoundError, NoSuchProcess, ValueError):
        fork = Process(int(Path(f"{os.environ['WARM_SERVER']}.{process.pid}").read_text()))
        if Process() in fork.parents():
            return [fork, *fork.children(recursive=True)]
    return []


def marked(environment: Mapping[str, str]) -> list[Process]:
    """All running processes that were started with the mark in `environment`, wherever they are in the tree."""
    found = []
    for process in process_iter():
        with suppress(NoSuchProcess, AccessDenied):
            if process.environ().get(MARK) == environment[MARK]:
                found.append(process)
    return found


def titled(title: str, among: Iterable[Process]) -> list[Process]:
    """Those processes whose title, the first argument of their command line, begins with `title`."""
    found = []
    for process in among:
        with suppress(NoSuchProcess, AccessDenied):
            if "".join(process.cmdline()[:1]).startswith(title):
                found.append(process)
    return found


def send(number: signal.Signals, to: Iterable[Process]) -> None:
    """Send a signal to processes that may have exited; a process id that was used anew since is left alone."""
    for process in to:
        with suppress(NoSuchProcess):
            process.send_signal(number)


def kill(those: Iterable[Process]) -> None:
    """Send SIGKILL, as `send` does."""
    send(signal.SIGKILL, those)
