"""Print and write the results of a benchmark: machine, tables, targets, and one JSON layout for all benchmarks.

`memory` holds bytes that `compare.py` compares with a baseline; `time_ratios` compare two sides of one run; `other`
holds informative figures that are too noisy to compare, or not better when smaller.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

MB = 1e6
# Without a terminal, as in logs, rich would fold tables to 80 columns.
console = Console(width=None if Console().is_terminal else 140, highlight=False)


def json_option(default: str = "below --workdir") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds --json, the file of a benchmark's result; `default` says where it is otherwise."""
    return click.option("--json", "path", type=click.Path(path_type=Path), help=f"Result file. Default: {default}.")


@dataclass(frozen=True)
class Target:
    """A figure that should not be above its limit; reported, never asserted."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass
class Report:
    """The settings and figures of one run of a benchmark; see the module for the sections."""

    settings: dict[str, Any]
    memory: dict[str, int] = field(default_factory=dict)
    time_ratios: dict[str, float] = field(default_factory=dict)
    other: dict[str, float] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the results so far, so that a long run that fails later keeps them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = [{**asdict(target), "met": target.met} for target in self.targets]
        path.write_text(json.dumps({"machine": machine(), **asdict(self), "targets": targets}, indent=1) + "\n")

    def finish(self, path: Path) -> None:
        """Print the targets and the machine, and write the JSON."""
        if self.targets:
            table = Table("target", "measured", "at most", "", title="targets")
            for target in self.targets:
                verdict = "[green]met[/green]" if target.met else "[red]MISSED[/red]"
                table.add_row(target.name, f"{target.value:.4g}", f"{target.limit:.4g}", verdict)
            console.print(table)
        console.print(", ".join(f"{key} {value}" for key, value in machine().items()))
        self.save(path)
        console.print(f"written to {path}", soft_wrap=True)


def machine() -> dict[str, Any]:
    """Return the processor, the memory, and the versions of the system and the main packages."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "ray", "transformers")},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print a table with the rows' names in its first column."""
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def in_mb(nbytes: float | None) -> str:
    """Return bytes as a text in MB, with a dash for None."""
    return "–" if nbytes is None else f"{nbytes / MB:,.1f}"
