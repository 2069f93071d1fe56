"""The times of a run over all its starts."""

from __future__ import annotations

from pathlib import Path

from engine.run.starts import (
    DOUBTS,
    EVERY,
    FOLDER,
    LEFT_OUT,
    Start,
    keep_doubts,
    keep_left_out,
    read_doubts,
    read_left_out,
    read_starts,
)
from engine.storage.local_folder import LocalFolder


def test_phases_are_recorded_while_they_run(tmp_path: Path) -> None:
    state, now = LocalFolder(tmp_path), [100.0]
    start = Start(state, lambda: now[0])
    start.begin("targets")
    now[0] += 2
    start.begin("stage 1")
    now[0] += 1
    start.end("targets")
    now[0] += EVERY / 2
    start.alive()
    (killed,) = read_starts(state)
    assert killed["seconds"] == 3, "the last record is not old"
    now[0] += EVERY / 2
    start.alive()
    (killed,) = read_starts(state)
    assert killed["seconds"] == 3 + EVERY
    assert killed["phases"] == [
        {"name": "targets", "begin": 0, "end": 3},
        {"name": "stage 1", "begin": 2, "end": 3 + EVERY},
    ]
    again = Start(state, lambda: now[0])
    again.begin("stage 1")
    now[0] += 1
    again.begin("stage 1")  # after the loss of a node
    now[0] += 4
    again.end("stage 1")
    assert [start["phases"] for start in read_starts(state)][1] == [
        {"name": "stage 1", "begin": 0, "end": 1},
        {"name": "stage 1", "begin": 1, "end": 5},
    ]


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    state = LocalFolder(tmp_path)
    assert (read_starts(state), read_left_out(state), read_doubts(state)) == ([], {}, [])
    keep_left_out(state, [("math", 0.25)])
    keep_doubts(state, ["code is damaged"])
    assert (read_left_out(state), read_doubts(state)) == ({"math": 0.25}, ["code is damaged"])
    for _ in range(2):
        Start(state)
    (tmp_path / FOLDER / "0000.json").write_bytes(b"{")
    for name in (LEFT_OUT, DOUBTS):
        (tmp_path / name).write_bytes(b"{")
    assert len(read_starts(state)) == 1 and (read_left_out(state), read_doubts(state)) == ({}, [])
