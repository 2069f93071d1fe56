"""The progress of a merge: a live display on a terminal and in a notebook, plain lines elsewhere, and telemetry."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import rich.console
import rich.progress
import rich.table
import rich.text

if TYPE_CHECKING:
    from cluster.telemetry import Telemetry
    from engine.run.starts import Start

# Of characters that every terminal has.
SPINNER = "line"
# Seconds over which the speed of a phase is averaged: long, since a step may take minutes.
SPEED_SECONDS = 3600.0


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show `what` with something that moves until the context ends; show nothing if the output is no terminal."""
    with rich.console.Console().status(what, spinner=SPINNER):
        yield


class Progress:
    """Shows phases of known length, by name, and lines. Phases may overlap.

    On a terminal, each phase that runs has a row with a bar, and a completed phase leaves a line. While no phase runs,
    a row says what the merge is waiting for. Elsewhere, every part of a phase is a line.

    Attributes:
        telemetry: Gets the phases and steps too, if set.
        start: Records when phases begin and end, if set.
        seconds: The durations of completed phases.
    """

    def __init__(self, telemetry: Telemetry | None = None, console: rich.console.Console | None = None) -> None:
        self.telemetry = telemetry
        self.start: Start | None = None
        self._console = console or rich.console.Console(highlight=False)
        is_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._is_live = is_terminal or _is_notebook(self._console)
        self._live = rich.progress.Progress(
            rich.progress.SpinnerColumn(SPINNER),
            rich.progress.TextColumn("[bold]{task.description}", markup=True),
            rich.progress.BarColumn(bar_width=12),
            _Parts(),
            rich.progress.TimeElapsedColumn(table_column=rich.table.Column(min_width=7)),
            _Left(compact=True),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._is_live,
            transient=True,
            speed_estimate_period=SPEED_SECONDS,
        )
        self._waiting = self._live.add_task("starting", total=None, note="")
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
        """Print a line, above the rows; `?` is for what the stream cannot encode, such as the name of an expert."""
        encoding = self._console.encoding
        self._console.print(line.encode(encoding, "replace").decode(encoding), markup=False, soft_wrap=True)
        self._console.file.flush()

    def wait(self, what: str) -> None:
        """Show `what` in the row for the time in which no phase runs."""
        self._live.reset(self._waiting, description=what, visible=not self._tasks)

    def lost(self, line: str) -> None:
        """Print a line about the loss of an attempt, and drop the rows of the phases that it did not complete."""
        for name in list(self._tasks):
            self._drop(name)
        self.say(line)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of `total` parts, of which `done` were completed by an earlier start."""
        self._totals[name], self._since[name] = total, time.monotonic()
        if self.telemetry:
            self.telemetry.phase(name, total, done)
        if self.start and done < total:
            self.start.begin(name)
        self._drop(name)
        if not self._is_live:
            self.say(f"[{self._seconds()}] {name}: {total}" + (f" ({done} done before)" if done else ""))
        elif done < total:
            self._tasks[name] = self._live.add_task(name, total=total, completed=done, note="")
            self._live.update(self._waiting, visible=False)

    def advance(self, name: str, done: int, note: str = "") -> None:
        """Report that `done` parts of the phase are complete."""
        total, complete = self._totals[name], done == self._totals[name]
        if self.telemetry:
            self.telemetry.advance(name, done)
        if complete:
            self.seconds[name] = time.monotonic() - self._since[name]
            if self.telemetry:
                self.telemetry.phase_seconds(name, self.seconds[name])
        if self.start and complete:
            self.start.end(name)
        elif self.start:
            self.start.alive()
        if not self._is_live:
            self.say(f"[{self._seconds()}] {name} {done}/{total}" + (f"  {note}" if note else ""))
        elif complete:
            self._drop(name)
            minutes, seconds = divmod(round(self.seconds[name]), 60)
            self.say(f"{name}  {done}/{total}  {minutes}:{seconds:02d}  {note}".rstrip())
        elif name in self._tasks:
            self._live.update(self._tasks[name], completed=done, note=note)

    def _drop(self, name: str) -> None:
        """Remove the row of a phase, if it has one."""
        if name in self._tasks:
            self._live.remove_task(self._tasks.pop(name))
        if not self._tasks:
            self._live.reset(self._waiting, visible=True)

    def step(self, name: str, done: int, rows: Sequence[Mapping[str, Any]], traffic: Mapping[str, int]) -> None:
        """Report that `done` optimiser steps of the phase are complete.

        Args:
            name: The phase.
            done: The number of completed steps.
            rows: The rows of merge/metrics.parquet of the last step.
            traffic: The bytes moved so far, by direction.
        """
        if self.telemetry:
            for direction, nbytes in traffic.items():
                self.telemetry.bytes(direction, nbytes)
            self.telemetry.step(rows)
        self.advance(name, done, step_note(rows))

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:6.1f} s"


def _is_notebook(console: rich.console.Console) -> bool:
    """Return whether the console is a notebook's, and there is ipywidgets, with which rich updates an output there."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


class _Parts(rich.progress.MofNCompleteColumn):
    """The completed parts of all, if their number is known."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return super().render(task) if task.total is not None else rich.text.Text()


class _Left(rich.progress.TimeRemainingColumn):
    """The time left, if it is known."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return super().render(task).append(" left") if task.time_remaining is not None else rich.text.Text()


def step_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the losses, learning rate and duration of an optimiser step as text, from its metrics rows."""
    if rows[0].get("entropy") is not None:
        entropy = sum(row["entropy"] for row in rows) / len(rows)
        return f"entropy {entropy:.4f}  lr {rows[0]['learning_rate']:.3g}  {rows[0]['seconds']:.1f} s"
    kl, hidden = (sum(row[key] for row in rows) / len(rows) for key in ("kl", "hidden"))
    return f"kl {kl:.4f}  hidden {hidden:.4f}  lr {rows[0]['learning_rate']:.3g}  {rows[0]['seconds']:.1f} s"
