"""The record of trials: files that come back, what --fresh removes, the best and the front, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from errors import refused

from engine.errors import DamagedError
from engine.search.record import TABLE, Trial, as_rows, best_of, discard, front, keep_trial, read_trials, write_table
from engine.storage.local_folder import LocalFolder


def trial(number: int, *scores: float, **more: Any) -> Trial:
    return Trial(number, more.pop("state", "done"), {"density": 0.5}, [list(scores)], **more)


def test_trials_come_back_by_number(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    trials = [trial(number, 0.1, why="ends" * number, attributes={"state": "ab"}) for number in (2, 0, 1_000_000)]
    for one in trials:
        keep_trial(folder, one)
    assert read_trials(folder) == sorted(trials, key=lambda one: one.number)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"number": 0, "other": 1}'])
def test_a_file_that_is_no_trial_is_named(tmp_path: Path, text: str) -> None:
    keep_trial(LocalFolder(tmp_path), trial(0, 0.1))
    (tmp_path / "trials" / "000000.json").write_text(text)
    with refused(DamagedError, "000000.json"):
        read_trials(LocalFolder(tmp_path))


def test_other_files_are_neither_read_nor_removed(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    keep_trial(folder, trial(0, 0.1))
    write_table(folder, as_rows([trial(0, 0.1)], ["density"]))
    for name in ("trials/notes.json", "trials/1.json", "own.txt"):
        folder.write(name, b"mine")
    assert len(read_trials(folder)) == 1
    discard(folder)
    assert folder.entries() == {"trials/notes.json", "trials/1.json", "own.txt"}


def test_the_best_is_done_and_the_front_is_not_dominated() -> None:
    trials = [
        trial(0, 0.5, 0.5),
        trial(1, 0.1, 0.8),
        trial(2, 0.4, 0.5),
        trial(3, 0.0, 0.0, state="stopped"),
        trial(4, 0.4, 0.5),
        Trial(5, "failed", {}, why="not finite"),
    ]
    found = best_of(trials)
    # Of equals, the first.
    assert found is not None and found.number == 1
    assert front(trials) == [1, 2, 4]
    assert best_of(trials[3:4]) is None


def test_the_table_has_a_row_per_trial_and_a_column_per_key(tmp_path: Path) -> None:
    one = Trial(0, "done", {"merge_method": "ties", "parameters.density": 1}, [[0.25]], {"a: kl": 0.25}, 1.5)
    two = Trial(1, "failed", {"merge_method": "linear", "parameters.density": 0.5}, why="not finite")
    three = Trial(2, "stopped", {"merge_method": True, "parameters.density": 0.5}, [[2.0]], {"a: kl": 2.0})
    write_table(LocalFolder(tmp_path), as_rows([one, two, three], ["merge_method", "parameters.density"]))
    rows = pyarrow.parquet.read_table(tmp_path / TABLE).to_pylist()
    assert [row["state"] for row in rows] == ["done", "failed", "stopped"]
    assert [row["best"] for row in rows] == [True, False, False]
    assert [row["score"] for row in rows] == [0.25, None, 2.0]
    assert [row["metric a: kl"] for row in rows] == [0.25, None, 2.0]
    assert [row["parameters.density"] for row in rows] == [1.0, 0.5, 0.5]
    # Several types in a column are JSON.
    assert [row["merge_method"] for row in rows] == ['"ties"', '"linear"', "true"]
    assert rows[1]["why"] == "not finite"
