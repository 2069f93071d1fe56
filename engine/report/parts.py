"""The parts of a page: sections, tables, charts, and numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

LOSS_NAMES = {"kl": "KL divergence", "hidden": "hidden loss", "entropy": "entropy"}
Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its heading. `explain`: the words of the head are in the glossary."""

    rows: Sequence[Sequence[Cell]]
    head: Sequence[str] = ()
    title: str = ""
    explain: bool = False

    def numeric(self, column: int) -> bool:
        """Return whether a column has numbers only."""
        return all(isinstance(row[column], int | float) for row in self.rows)


@dataclass(frozen=True)
class Chart:
    """A plotly figure with a title; `wide`: as wide as the page; `logs`: its vertical axis can be made logarithmic."""

    title: str
    figure: Any
    wide: bool = False
    logs: bool = False


@dataclass(frozen=True)
class ReportSection:
    """A section of the page; `folded` is a table that is collapsed at first.

    `points` are sentences in a list, and `warnings` are sentences that need attention.
    """

    title: str
    text: str = ""
    points: Sequence[str] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    folded: Table | None = None


class PerCent(float):
    """A share, which is shown as per cent."""


def number(value: float) -> str:
    """Return a number with three significant digits, or all digits of a whole number; a dash for NaN."""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def share(value: float) -> str:
    """Return a share as per cent: whole ones from 10 on, two digits below."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:,.0f} %" if abs(value) >= 0.0995 else f"{100 * value:.2g} %"


def moment(text: str) -> str:
    """Return a date and time in ISO format to the minute; a text that is none unchanged."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return text


def duration(seconds: float) -> str:
    """Return a duration in the two largest of its units, such as `2 h 05 min`; tenths of seconds below 10 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"
