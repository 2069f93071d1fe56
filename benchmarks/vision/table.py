"""The results as lines of JSON, and as a Markdown table: `python benchmarks/vision/table.py [--adapters]`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from pictures import SKILLS
from train import ADAPTER

RESULTS = Path(__file__).resolve().parent / "results"
Line = dict[str, Any]


def read(name: str) -> list[Line]:
    """Return the lines of `results/NAME.jsonl`."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(name: str, line: Line) -> None:
    """Append a line to `results/NAME.jsonl`, and print its scores."""
    RESULTS.mkdir(exist_ok=True)
    rounded = {
        split: {skill: [round(one, 4) for one in scores] for skill, scores in line[split].items()}
        for split in ("validation", "test")
        if split in line
    }
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line | rounded) + "\n")
    shown = " ".join(f"{skill} {scores[0]:.1f}" for skill, scores in line[name].items())
    print(
        f"{name} {line['row']} {line.get('setting', '')} {line.get('factor', '')} {line.get('seconds', '')}: {shown}",
        flush=True,
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Format the mean, with the standard deviation if there are several values."""
    several = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{several}"


def mean(line: Line, place: int, split: str = "test") -> float:
    """Return the mean over the skills of exact match (0) or loss (1)."""
    return statistics.mean(scores[place] for scores in line[split].values())


def chosen(lines: list[Line]) -> str:
    """Return the settings and factors that the runs chose, if there was a choice."""
    found = []
    for line in lines:
        options = {key.removeprefix("parameters."): value for key, value in line.get("setting", {}).items()}
        options = {key: value for key, value in options.items() if key not in ("samples_per_model", "calibrate")}
        options |= {"lambda": line["factor"]} if line.get("factor", 1.0) != 1.0 else {}
        found.append(" ".join(f"{key} {value}" for key, value in options.items()) if line.get("labels") else "")
    text = ", ".join(sorted(set(found) - {""}))
    return f" ({text})" if text else ""


def print_table(kind: str) -> None:
    """Print the test scores of the experts of a kind and of their merges."""
    lines = [line for line in read("test") if line["kind"] in (kind, "any")]
    own = {line["row"]: line["test"][line["row"]][0] for line in lines if line["row"] in SKILLS}
    print(f"| model | {' | '.join(SKILLS)} | mean | normalised | loss | samples | answers | seconds | peak GB | runs |")
    print(f"|{'---|' * (len(SKILLS) + 9)}")
    for row in dict.fromkeys(line["row"] for line in lines):
        runs = [line for line in lines if line["row"] == row]
        cells = [spread([line["test"][skill][0] for line in runs], 1) for skill in SKILLS]
        cells.append(spread([mean(line, 0) for line in runs], 1))
        normalised = [statistics.mean(line["test"][skill][0] / own[skill] for skill in SKILLS) for line in runs]
        cells += [spread(normalised, 3), spread([mean(line, 1) for line in runs], 3)]
        if "setting" in runs[0]:
            cells += [str(runs[0]["samples"]), str(runs[0]["labels"])]
            cells.append(f"{statistics.mean(line['seconds'] for line in runs):.0f}")
            cells += [f"{max(line['peak'] for line in runs) / 1e9:.2f}", str(len(runs))]
        else:
            cells += [""] * 5
        name = f"expert {row}" if row in SKILLS else row
        print(f"| {name}{chosen(runs)} | {' | '.join(cells)} |")


@click.command(help=__doc__)
@click.option("--adapters", is_flag=True)
def main(adapters: bool) -> None:
    print_table(ADAPTER if adapters else "")


if __name__ == "__main__":
    main()
