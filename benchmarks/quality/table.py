"""Print the results as Markdown tables: the comparison (`test`), or every trial (`validation`, `sensitivity`).

`normalised` is the mean over the skills of a model's exact match divided by that of the skill's own expert. Several
seeds are shown as mean ± standard deviation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import click
import tasks
from choose import RESULTS
from fine_tune import MIXTURES
from space import CHOSEN, CHOSEN_LEARNED

Line = dict[str, Any]


def read(name: str) -> list[Line]:
    """Read the lines of `results/NAME.jsonl`."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def own_scores(lines: Sequence[Line]) -> dict[str, float]:
    """Return the exact match of each skill's own expert, in per cent."""
    models = {line["key"].get("model"): line["exact_match"] for line in lines}
    return {skill: models[skill][skill] for skill in tasks.BENCHES["a"]}


def normalised(line: Line, own: dict[str, float]) -> float:
    """Return the mean over the skills of exact match divided by that of the skill's own expert."""
    return statistics.mean(line["exact_match"][skill] / own[skill] for skill in line["exact_match"])


def spread(values: Sequence[float], digits: int) -> str:
    """Format the mean, with the standard deviation if there are several values."""
    several = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{several}"


def groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Yield the rows of the table: a name, and its lines, one per seed."""
    for model in ("base", *tasks.BENCHES["a"], MIXTURES["a"]):
        of_model = [line for line in lines if line["key"] == {"model": model}]
        yield (model if model in ("base", MIXTURES["a"]) else f"expert {model}"), of_model
    for method, (options, scale) in CHOSEN.items():
        key = {"method": method, "options": options, "scale": scale}
        yield method, [line for line in lines if key.items() <= line["key"].items()]
    for name, (method, options) in CHOSEN_LEARNED.items():
        yield name, [line for line in lines if {"method": method, "options": options}.items() <= line["key"].items()]


def print_test() -> None:
    """Print the comparison on the test split."""
    lines = read("test")
    own = own_scores(lines)
    print("| model | " + " | ".join(tasks.BENCHES["a"]) + " | mean | normalised | loss | seeds |")
    print("|---" * (len(tasks.BENCHES["a"]) + 5) + "|")
    for name, seeds in groups(lines):
        if not seeds:
            continue
        skills = [spread([line["exact_match"][skill] for line in seeds], 1) for skill in tasks.BENCHES["a"]]
        means = [statistics.mean(line["exact_match"].values()) for line in seeds]
        losses = [statistics.mean(line["loss"].values()) for line in seeds]
        cells = [*skills, spread(means, 1), spread([normalised(line, own) for line in seeds], 3), spread(losses, 3)]
        print(f"| {name} | " + " | ".join([*cells, str(len(seeds))]) + " |")


def print_tries(name: str) -> None:
    """Print a row for every line of a results file."""
    print("| method | options | mean exact match | loss |\n|---|---|---|---|")
    for line in read(name):
        key = dict(line["key"])
        what = key.pop("method", None) or key.pop("model")
        options = {**key.pop("options", {}), **key}
        settings = ", ".join(f"{option} {value}" for option, value in options.items())
        mean, loss = statistics.mean(line["exact_match"].values()), statistics.mean(line["loss"].values())
        print(f"| {what} | {settings} | {mean:.1f} | {loss:.3f} |")


@click.command()
@click.argument("what", type=click.Choice(["test", "validation", "sensitivity"]), default="test")
def main(what: str) -> None:
    print_test() if what == "test" else print_tries(what)


if __name__ == "__main__":
    main()
