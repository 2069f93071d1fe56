"""What a run keeps for its report: when each of its starts worked on which phase, and what is not merged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from engine.errors import DamagedError
from engine.storage.folder import Folder
from engine.storage.sealed import read_sealed, write_sealed

# Subfolder of the state, and seconds between two records of a start that is at work: what a kill can lose.
FOLDER, EVERY = "starts", 15.0
LEFT_OUT, DOUBTS = "left-out.json", "doubts.json"


class Start:
    """The record of this start of a run, in a file of its own.

    `clock` returns seconds.
    """

    def __init__(self, state: Folder, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._clock = state, clock
        self._file = f"{FOLDER}/{len(state.names(FOLDER)):04}.json"
        self._began = self._stored = clock()
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._phases: list[dict[str, Any]] = []
        self._open: dict[str, dict[str, Any]] = {}
        self._store()

    def begin(self, phase: str) -> None:
        """Record that a phase begins; if it is at work already, such as before the loss of a node, it ends first."""
        self._close(phase)
        self._open[phase] = {"name": phase, "begin": self._now(), "end": self._now()}
        self._phases.append(self._open[phase])
        self._store()

    def end(self, phase: str) -> None:
        """Record that a phase ended."""
        self._close(phase)
        self._store()

    def alive(self) -> None:
        """Record that the start is still at work, if the last record is old."""
        if self._clock() - self._stored >= EVERY:
            self._store()

    def _close(self, phase: str) -> None:
        if phase in self._open:
            self._open.pop(phase)["end"] = self._now()

    def _now(self) -> float:
        return round(self._clock() - self._began, 2)

    def _store(self) -> None:
        for phase in self._open.values():
            phase["end"] = self._now()
        self._stored = self._clock()
        content = {"began": self._date, "seconds": self._now(), "phases": self._phases}
        write_sealed(self._state, self._file, json.dumps(content).encode())


def read_starts(state: Folder) -> list[dict[str, Any]]:
    """Return the starts of a run in order: `began` (date and time), `seconds`, and `phases` with their begin and end.

    `begin` and `end` are seconds since the start. Damaged records are left out.
    """
    starts = []
    for name in sorted(state.names(FOLDER)):
        try:
            starts.append(json.loads(read_sealed(state, name)))
        except (FileNotFoundError, DamagedError):
            continue
    return starts


def keep_left_out(state: Folder, shares: Sequence[tuple[str, float]]) -> None:
    """Store the share of each expert's squared change that is in tensors that are not merged."""
    write_sealed(state, LEFT_OUT, json.dumps(dict(shares)).encode())


def read_left_out(state: Folder) -> dict[str, float]:
    """Return what `keep_left_out` stored; nothing if it is missing or damaged."""
    try:
        return dict(json.loads(read_sealed(state, LEFT_OUT)))
    except (FileNotFoundError, DamagedError):
        return {}


def keep_doubts(state: Folder, lines: Sequence[str]) -> None:
    """Store what the weights say against the merge."""
    write_sealed(state, DOUBTS, json.dumps(list(lines)).encode())


def read_doubts(state: Folder) -> list[str]:
    """Return what `keep_doubts` stored; nothing if it is missing or damaged."""
    try:
        return list(json.loads(read_sealed(state, DOUBTS)))
    except (FileNotFoundError, DamagedError):
        return []
