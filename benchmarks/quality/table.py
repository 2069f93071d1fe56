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
from command_line import costs
from fine_tune import MIXTURES, STEPS
from space import CHOSEN, CHOSEN_LEARNED, LEARNED, SAMPLED, SCALED, WEIGHT_SPACE
from train_experts import BATCH

Line = dict[str, Any]
SAMPLES = 8


def read_all(name: str) -> list[Line]:
    """Read the lines of `results/NAME.jsonl`, with the training of the experts taken out of their keys."""
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return [line | {"training": line["key"].pop("training")} for line in lines]


def read(name: str, training: str = "") -> list[Line]:
    """Read the lines of `results/NAME.jsonl` for the experts of one training (default: that of the last line)."""
    lines = read_all(name)
    training = training or lines[-1]["training"]
    return [line for line in lines if line["training"] == training]


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


def groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line], list[str]]]:
    """Yield the rows of the table: a name, its lines, one per seed, and what the merge takes."""
    mixture = MIXTURES["a"]
    for model in ("base", *tasks.BENCHES["a"], mixture):
        of_model = [line for line in lines if line["key"] == {"model": model}]
        answers = str(STEPS // 2 * BATCH * len(tasks.BENCHES["a"])) if model == mixture else ""
        yield (model if model in ("base", mixture) else f"expert {model}"), of_model, ["", answers, "", ""]
    for method, (options, scale) in CHOSEN.items():
        key = {"method": method, "options": options, "scale": scale}
        tried = len(WEIGHT_SPACE[method]) * len(SCALED[method])
        seen = SAMPLES if method in SAMPLED else 0
        found = [line for line in lines if key.items() <= line["key"].items()]
        yield method, found, [str(seen), answers_for(tried), *cost(method, options)]
    for name, (method, options) in CHOSEN_LEARNED.items():
        key = {"method": method, "options": options}
        tried = len(LEARNED[method]) if options in LEARNED.get(method, ()) else 1
        found = [line for line in lines if key.items() <= line["key"].items()]
        yield name, found, [str(SAMPLES), answers_for(tried), *cost(method, options)]


def answers_for(tried: int) -> str:
    """Return the number of labelled questions that chose between so many settings."""
    return str(len(tasks.BENCHES["a"]) * tasks.SIZES["validation"] if tried > 1 else 0)


def cost(method: str, options: dict[str, Any]) -> list[str]:
    """Return seconds and GB of a merge; with a plus if it went on from what the cache had. Empty if not measured."""
    wanted = {"method": method, "options": options}
    mine = [line for line in costs() if {**line["key"], "training": ""} == {**wanted, "training": ""}]
    if not mine:
        return ["", ""]
    first = min(mine, key=lambda line: (bool(line["reused"]), line["seconds"]))
    return [f"{'+ ' if first['reused'] else ''}{first['seconds']:.0f}", f"{first['peak'] / 1e9:.2f}"]


def print_test(training: str) -> None:
    """Print the comparison on the test split."""
    lines = read("test", training)
    own = own_scores(lines)
    columns = ["model", *tasks.BENCHES["a"], "mean", "normalised", "loss", "seeds"]
    columns += ["samples", "answers", "seconds", "GB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, seeds, takes in groups(lines):
        if not seeds:
            continue
        skills = [spread([line["exact_match"][skill] for line in seeds], 1) for skill in tasks.BENCHES["a"]]
        means = [statistics.mean(line["exact_match"].values()) for line in seeds]
        losses = [statistics.mean(line["loss"].values()) for line in seeds]
        cells = [*skills, spread(means, 1), spread([normalised(line, own) for line in seeds], 3), spread(losses, 3)]
        print(f"| {name} | " + " | ".join([*cells, str(len(seeds)), *takes]) + " |")


def print_tries(name: str, training: str) -> None:
    """Print a row for every line of a results file."""
    print("| method | options | mean exact match | loss |\n|---|---|---|---|")
    for line in read(name, training):
        key = dict(line["key"])
        what = key.pop("method", None) or key.pop("model")
        options = {**key.pop("options", {}), **key}
        settings = ", ".join(f"{option} {value}" for option, value in options.items())
        mean, loss = statistics.mean(line["exact_match"].values()), statistics.mean(line["loss"].values())
        print(f"| {what} | {settings} | {mean:.1f} | {loss:.3f} |")


@click.command()
@click.argument("what", type=click.Choice(["test", "validation", "sensitivity"]), default="test")
@click.option("--training", default="", help="Of the experts of this training. Default: that of the last line.")
def main(what: str, training: str) -> None:
    print_test(training) if what == "test" else print_tries(what, training)


if __name__ == "__main__":
    main()
