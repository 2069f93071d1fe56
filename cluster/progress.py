"""The progress of a merge: a live display on a terminal and in a notebook, plain lines elsewhere, and telemetry."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import rich.console
import rich.progress
import rich.table

if TYPE_CHECKING:
    from cluster.telemetry import Telemetry


class Progress:
    """Shows phases of known length, by name. Phases may overlap.

    `seconds` holds the durations of completed phases.
    """

    def __init__(self, telemetry: Telemetry | None = None, console: rich.console.Console | None = None) -> None:
        self._telemetry = telemetry
        self._console = console or rich.console.Console(highlight=False, soft_wrap=True)
        self._is_live = self._console.is_terminal or _is_notebook(self._console)
        self._live = rich.progress.Progress(
            rich.progress.TextColumn("[bold]{task.description}"),
            rich.progress.BarColumn(bar_width=12),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(table_column=rich.table.Column(min_width=7)),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._is_live,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._totals: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.refresh()  # in a notebook, `stop` does not
        self._live.stop()

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False)
        self._console.file.flush()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of `total` parts, of which `done` were completed by an earlier start."""
        self._totals[name], self._since[name] = total, time.monotonic()
        if self._telemetry:
            self._telemetry.phase(name, total, done)
        if self._is_live:
            self._tasks[name] = self._live.add_task(name, total=total, completed=done, note="")
        else:
            self.say(f"[{self._seconds()}] {name}: {total}" + (f" ({done} done before)" if done else ""))

    def advance(self, name: str, done: int, note: str = "") -> None:
        """Report that `done` parts of the phase are complete."""
        if name in self._tasks:
            self._live.update(self._tasks[name], completed=done, note=note)
        else:
            self.say(f"[{self._seconds()}] {name} {done}/{self._totals[name]}" + (f"  {note}" if note else ""))
        if self._telemetry:
            self._telemetry.advance(name, done)
        if done == self._totals[name]:
            self.seconds[name] = time.monotonic() - self._since[name]
            if self._telemetry:
                self._telemetry.phase_seconds(name, self.seconds[name])

    def step(self, name: str, done: int, rows: Sequence[Mapping[str, Any]], traffic: Mapping[str, int]) -> None:
        """Report that `done` optimiser steps of the phase are complete.

        Args:
            name: The phase.
            done: The number of completed steps.
            rows: The rows of merge/metrics.parquet of the last step.
            traffic: The bytes moved so far, by direction.
        """
        if self._telemetry:
            for direction, nbytes in traffic.items():
                self._telemetry.bytes(direction, nbytes)
            self._telemetry.step(rows)
        self.advance(name, done, step_note(rows))

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:6.1f} s"


def _is_notebook(console: rich.console.Console) -> bool:
    """Return whether the console is a notebook's, and there is ipywidgets, with which rich updates an output there."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


def step_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the losses, learning rate and duration of an optimiser step as text, from its metrics rows."""
    if rows[0].get("entropy") is not None:
        entropy = sum(row["entropy"] for row in rows) / len(rows)
        return f"entropy {entropy:.4f}  lr {rows[0]['learning_rate']:.3g}  {rows[0]['seconds']:.1f} s"
    kl, hidden = (sum(row[key] for row in rows) / len(rows) for key in ("kl", "hidden"))
    return f"kl {kl:.4f}  hidden {hidden:.4f}  lr {rows[0]['learning_rate']:.3g}  {rows[0]['seconds']:.1f} s"
