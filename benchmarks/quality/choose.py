"""Score options on the validation split and append a line to `results/validation.jsonl` per trial not there yet.

`python benchmarks/quality/choose.py [METHOD ...]` goes through the options of `space.py`;
`--try METHOD '{"epochs": 4}'` scores other options of a learned method. The defaults are calibration seed 0 and 8
samples per expert.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from bench import Bench
from command_line import in_bench, merged
from fine_tune import WORKDIR
from safetensors.torch import load_model, save_model
from space import LEARNED, SCALED, WEIGHT_SPACE

RESULTS = Path(__file__).resolve().parent / "results"


class Log:
    """A JSON Lines file in which every line has a unique `key`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(exist_ok=True)
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, **key: Any) -> bool:
        """Return whether there is a line with this key."""
        return any(line["key"] == key for line in self.lines)

    def add(self, key: dict[str, Any], **results: Any) -> None:
        """Append a line and print its mean scores."""
        line = {"key": key, **results}
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        matches = {skill: round(value, 1) for skill, value in results["exact_match"].items()}
        mean = sum(matches.values()) / len(matches)
        loss = sum(results["loss"].values()) / len(results["loss"])
        print(f"{json.dumps(key)}: {mean:.1f} % loss {loss:.4f}  {matches}", flush=True)


def score_into(
    log: Log, bench: Bench, split: str, key: dict[str, Any], skills: Sequence[str] = (), **more: Any
) -> None:
    """Score the bench's model on a split of some skills (none: of all) and log it."""
    began = time.monotonic()
    score = bench.score(split, skills)
    seconds = {"scoring": round(time.monotonic() - began, 1)} | more.pop("seconds", {})
    log.add(key, exact_match=score.exact_match, loss=score.loss, seconds=seconds, **more)


def stored(bench: Bench, method: str, options: dict[str, Any], seed: int = 0, samples: int = 8) -> Path:
    """Return the file with the method's merge, which is computed once."""
    name = f"{method} {json.dumps(options | bench.which)} {seed} {samples}.safetensors"
    path = bench.workdir / "merges" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        if in_bench(method, options):
            bench.combine(bench.plan(method, options, seed, samples))
        else:
            with merged(bench, method, options, seed, samples) as out:
                bench.load(str(out))
        save_model(bench.model, path)
    return path


def scaled(
    bench: Bench, method: str, options: dict[str, Any], scales: tuple[float, ...], seed: int = 0
) -> Iterator[float]:
    """Set the model to the method's merge at each scale in turn."""
    path = stored(bench, method, options, seed)
    bench.load("base")
    base = {name: parameter.data.clone() for name, parameter in bench.model.named_parameters()}
    load_model(bench.model, path)
    merged = {name: parameter.data.clone() for name, parameter in bench.model.named_parameters()}
    for scale in scales:
        for name, parameter in bench.model.named_parameters():
            parameter.data.copy_(base[name]).add_(merged[name] - base[name], alpha=scale)
        yield scale


def climb(scales: Sequence[float], start: float, score: Callable[[float], float]) -> None:
    """Score the scale `start`, then those on either side of it for as long as the score gets better."""
    for direction in (1, -1):
        place = scales.index(start)
        while 0 <= place + direction < len(scales) and score(scales[place + direction]) > score(scales[place]):
            place += direction


def climb_options(log: Log, bench: Bench, method: str, options: dict[str, Any]) -> None:
    """Score a weight-space method with these options on the validation split, from the middle of its scales."""
    scales = SCALED[method]

    def score(scale: float) -> float:
        key = {"method": method, "options": options, "scale": scale} | bench.which
        if not log.has(**key):
            for _ in scaled(bench, method, options, (scale,)):
                score_into(log, bench, "validation", key)
        matches = next(line["exact_match"] for line in log.lines if line["key"] == key)
        return float(sum(matches.values()))

    climb(scales, scales[len(scales) // 2], score)


def try_learned(
    log: Log, bench: Bench, split: str, method: str, options: dict[str, Any], seed: int = 0, samples: int = 8
) -> None:
    """Run a learned method, or one that runs models on samples, and score the stages that are not logged yet."""
    if not in_bench(method, options):
        key = {"method": method, "options": options, "seed": seed, "samples": samples} | bench.which
        if not log.has(**key):
            load_model(bench.model, stored(bench, method, options, seed, samples))
            score_into(log, bench, split, key)
        return
    plan = bench.plan(method, options, seed, samples)
    names = ["expert_merging", method] if plan.config.stages == 2 else [method]
    keys = [{"method": name, "options": options, "seed": seed, "samples": samples} | bench.which for name in names]
    if log.has(**keys[-1]):
        return
    began = time.monotonic()
    plan, stages, rows = bench.learn(plan)
    learning = round(time.monotonic() - began, 1)
    for key, coefficients in zip(keys, stages, strict=True):
        if log.has(**key):
            continue
        bench.merge(plan, coefficients)
        last = [row for row in rows if row["stage"] == keys.index(key) + 1][-len(bench.skills) :]
        losses = {name: sum(row[name] or 0.0 for row in last) / len(last) for name in ("kl", "hidden", "entropy")}
        alpha = {name: float(mine.mean()) for name, mine in zip(bench.skills, coefficients.values, strict=True)}
        score_into(
            log,
            bench,
            split,
            key,
            seconds={"learning": learning},
            last=losses,
            mean_coefficient=alpha,
            priors=plan.priors,
        )


@click.command()
@click.argument("methods", nargs=-1)
@click.option("--try", "tries", multiple=True, type=(str, str), metavar="METHOD JSON")
@click.option("--seed", default=0)
@click.option("--samples", default=8)
@click.option("--adapters", default="", help="The end of the names of LoRA experts, such as -r16. Default: full ones.")
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(os.environ.get("QUALITY_WORKDIR", WORKDIR)))
def main(
    methods: tuple[str, ...],
    tries: tuple[tuple[str, str], ...],
    seed: int,
    samples: int,
    adapters: str,
    workdir: Path,
) -> None:
    bench, log = Bench(workdir, adapters=adapters), Log(RESULTS / "validation.jsonl")
    for method, text in tries:
        try_learned(log, bench, "validation", method, json.loads(text), seed, samples)
    for method in methods:
        single = {"model": method} | bench.which
        if method in ("base", "mixture", *(skill + adapters for skill in bench.skills)) and not log.has(**single):
            bench.load(method)
            score_into(log, bench, "validation", single)
        for options in WEIGHT_SPACE.get(method, ()):
            climb_options(log, bench, method, options)
        for options in LEARNED.get(method, ()):
            try_learned(log, bench, "validation", method, options, seed, samples)


if __name__ == "__main__":
    main()
