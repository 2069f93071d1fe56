"""What a person sees while a merge runs: a live display on a terminal, plain flushed lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import rich.console
import rich.progress
import rich.table


class Progress:
    """Phases of known length, one at a time."""

    def __init__(self, console: rich.console.Console | None = None) -> None:
        self._console = console or rich.console.Console(highlight=False, soft_wrap=True)
        self._live = rich.progress.Progress(
            rich.progress.TextColumn("[bold]{task.description}"),
            rich.progress.BarColumn(bar_width=12),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(table_column=rich.table.Column(min_width=7)),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: rich.progress.TaskID | None = None
        self._phase, self._total, self._began = "", 0, time.monotonic()

    def __enter__(self) -> Progress:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False)
        self._console.file.flush()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of `total` parts, of which `done` were done before."""
        self._phase, self._total = name, total
        if self._console.is_terminal:
            self._task = self._live.add_task(name, total=total, completed=done, note="")
        else:
            self.say(f"[{self._seconds()}] {name}: {total}" + (f" ({done} done before)" if done else ""))

    def advance(self, done: int, note: str = "") -> None:
        """`done` parts of the phase are done."""
        if self._task is not None:
            self._live.update(self._task, completed=done, note=note)
        else:
            self.say(f"[{self._seconds()}] {self._phase} {done}/{self._total}" + (f"  {note}" if note else ""))

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:6.1f} s"


def step_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """What an optimiser step saw, from its rows of merge/metrics.parquet."""
    if rows[0].get("entropy") is not None:
        entropy = sum(row["entropy"] for row in rows) / len(rows)
        return f"entropy {entropy:.4f}  lr {rows[0]['learning_rate']:.3g}  {rows[0]['seconds']:.1f} s"
    kl, hidden = (sum(row[key] for row in rows) / len(rows) for key in ("kl", "hidden"))
    return f"kl {kl:.4f}  hidden {hidden:.4f}  lr {rows[0]['learning_rate']:.3g}  {rows[0]['seconds']:.1f} s"
