"""Compare a benchmark's result with a baseline of the same benchmark.

The exit code is 1 if a memory figure is more than 5 % above the baseline's. Times are shown and never fail, because
machines are shared and differ. Figures that only one of the two has are listed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from report import console, print_table

TOLERANCE = 0.05


def differences(result: dict[str, Any], baseline: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each difference in machine and settings, and for each figure that only one side has."""
    for section in ("machine", "settings"):
        for key in sorted(result[section].keys() | baseline[section].keys()):
            mine, theirs = result[section].get(key), baseline[section].get(key)
            if mine != theirs:
                yield f"{section}: {key} is {mine}, in the baseline {theirs}"
    for section in ("memory", "time_ratios", "other"):
        mine, theirs = result.get(section, {}), baseline.get(section, {})
        yield from (f"{section}: {key} is only in the result" for key in mine if key not in theirs)
        yield from (f"{section}: {key} is only in the baseline" for key in theirs if key not in mine)


def ratios(section: str, result: dict[str, Any], baseline: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return result, baseline and their ratio for each figure that both have."""
    mine, theirs = result.get(section, {}), baseline.get(section, {})
    both = [key for key in mine if key in theirs]
    return {key: (mine[key], theirs[key], _ratio(mine[key], theirs[key])) for key in both}


def _ratio(mine: float, theirs: float) -> float:
    if mine == theirs:
        return 1.0
    return mine / theirs if theirs else float("inf")


@click.command(help=__doc__)
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("baseline", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(result: Path, baseline: Path) -> None:
    mine, theirs = (json.loads(path.read_text()) for path in (result, baseline))
    for line in differences(mine, theirs):
        console.print(line, markup=False, soft_wrap=True)
    memory = ratios("memory", mine, theirs)
    worse = [key for key, (_, _, ratio) in memory.items() if ratio > 1 + TOLERANCE]
    cells = {
        key: [f"{new:,.0f}", f"{old:,.0f}", f"{ratio:.3f}", "[red]WORSE[/red]" if key in worse else ""]
        for key, (new, old, ratio) in memory.items()
    }
    print_table("bytes", ["result", "baseline", "ratio", ""], cells)
    for section, title in (("time_ratios", "times, as ratios of two sides of one run"), ("other", "other figures")):
        shared = ratios(section, mine, theirs)
        if shared:
            cells = {key: [f"{new:.4g}", f"{old:.4g}", f"{ratio:.3f}"] for key, (new, old, ratio) in shared.items()}
            print_table(title, ["result", "baseline", "ratio"], cells)
    if not memory:
        console.print("result and baseline have no memory figure in common")
        sys.exit(1)
    if worse:
        console.print(f"{len(worse)} of {len(memory)} figures are more than {TOLERANCE:.0%} above the baseline")
        sys.exit(1)
    console.print(f"none of {len(memory)} figures is more than {TOLERANCE:.0%} above the baseline")


if __name__ == "__main__":
    main()
