"""The record of a search's trials: a file for each, from which the same command goes on, and a table of all."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet

from engine.config.search.settings import Value
from engine.errors import DamagedError
from engine.storage.folder import Folder

# Subfolder of the files of trials, and the table.
TRIALS, TABLE = "trials", "trials.parquet"
_FILE = re.compile(rf"{TRIALS}/\d{{6,}}\.json")


@dataclass(frozen=True)
class Trial:
    """A trial that has ended.

    Attributes:
        number: Its number, from 0 in the order in which trials are proposed.
        state: `done`: scored on all records. `stopped`: it ended at a rung. `failed`: its merge cannot be scored.
        values: The values of the keys of the space.
        scores: What was minimised, one number per objective, after each rung.
        metrics: The metrics of its last rung, by data and name.
        seconds: Its time.
        why: Why it failed.
        attributes: The state of the algorithm.
    """

    number: int
    state: Literal["done", "stopped", "failed"]
    values: dict[str, Value]
    scores: list[list[float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    why: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> list[float]:
        """The scores of its last rung."""
        return self.scores[-1] if self.scores else []


def keep_trial(folder: Folder, trial: Trial) -> None:
    """Write the file of a trial. The file is complete or absent."""
    folder.write(f"{TRIALS}/{trial.number:06}.json", json.dumps(asdict(trial), sort_keys=True).encode())


def read_trials(folder: Folder) -> list[Trial]:
    """Return the trials in a folder, by number.

    Raises:
        DamagedError: A file is not that of a trial.
    """
    found = []
    for name in _files(folder):
        try:
            found.append(Trial(**json.loads(folder.read(name))))
        except (ValueError, TypeError) as error:
            raise DamagedError("not a trial of a search", f"{folder.where}/{name}", do="remove the file") from error
    return sorted(found, key=lambda trial: trial.number)


def discard(folder: Folder) -> None:
    """Remove the files of trials, and the table."""
    for name in [*_files(folder), TABLE]:
        folder.remove(name)


def _files(folder: Folder) -> list[str]:
    """Return the names of the files of trials, by number."""
    found = {name for name in folder.names(TRIALS) if _FILE.fullmatch(name)}
    return sorted(found, key=lambda name: (len(name), name))


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the least sum of scores, the first of equals; None if none is done."""
    done = [trial for trial in trials if trial.state == "done"]
    return min(done, key=lambda trial: (sum(trial.last), trial.number), default=None)


def front(trials: Sequence[Trial]) -> list[int]:
    """Return the numbers of the done trials that no other one dominates: as good in all scores, better in one."""
    done = [trial for trial in trials if trial.state == "done"]
    return [
        one.number
        for one in done
        if not any(all(x <= y for x, y in zip(o.last, one.last, strict=True)) and o.last != one.last for o in done)
    ]


def as_rows(trials: Sequence[Trial], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the table of trials as rows: the score, metrics, and the values of the keys in `names`."""
    best, undominated = best_of(trials), front(trials)
    metrics = list(dict.fromkeys(metric for trial in trials for metric in trial.metrics))
    return [
        {
            "number": trial.number,
            "state": trial.state,
            "best": trial is best,
            "front": trial.number in undominated,
            "score": sum(trial.last) if trial.last else None,
            "rungs": len(trial.scores),
            "seconds": trial.seconds,
            **{f"metric {metric}": trial.metrics.get(metric) for metric in metrics},
            **{name: trial.values.get(name) for name in names},
            "why": trial.why,
        }
        for trial in trials
    ]


def write_table(folder: Folder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table of trials as a parquet file. Values of several types in a column are written as text."""
    columns = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        numbers = kinds <= {int, float}
        mixed = len(kinds) > 1 and not numbers
        columns[name] = [json.dumps(value) for value in values] if mixed else values
        if numbers and len(kinds) > 1:
            columns[name] = [None if value is None else float(value) for value in values]
    data = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), data)
    folder.write(TABLE, data.getvalue())
