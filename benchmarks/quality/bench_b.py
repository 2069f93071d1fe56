"""Merge the experts of bench B, on which no option was chosen, by every method, and score them on the test split.

`python benchmarks/quality/bench_b.py` trains what is missing and appends lines to `results/bench_b.jsonl` for what is
not there yet: base, experts and mixture, each weight-space method at the options chosen on bench A and, in the method's
favour, at its best scale on this very test split, and Expert Merging with its defaults and five calibration seeds. It
is run once per release, and reported whatever it says; `table_b.py` prints the tables.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import tasks
from bench import Bench
from choose import RESULTS, Log, climb, scaled, score_into, try_learned
from fine_tune import MIXTURES, WORKDIR, train
from space import CHOSEN, SCALED, SEEDED

COUNTS, ADAPTERS = (4, 6, 10), ("", "-r16", "-r8")
LEARNED = ("expert_merging_pp",)  # its lines have stage 1, which is Expert Merging


def single_models(log: Log, bench: Bench) -> None:
    """Score base and mixture on all skills, and every expert on its own."""
    experts = {skill + bench.adapters: [skill] for skill in bench.skills}
    models = experts if bench.adapters else {"base": [], MIXTURES["b"]: []} | experts
    for name in models:
        train(name, bench.workdir)
    for name, skills in models.items():
        key = {"model": name, "training": bench.training}
        if not log.has(**key):
            bench.load(name)
            score_into(log, bench, "test", key, skills)


def at_scales(log: Log, bench: Bench, method: str) -> None:
    """Score a method at its chosen scale, then at scales around it for as long as the exact match gets better."""
    options, chosen = CHOSEN[method]

    def mean_at(scale: float) -> float:
        key = {"method": method, "options": options, "scale": scale, "seed": 0} | bench.which
        if not log.has(**key):
            seeded = options | ({"seed": 0} if method in SEEDED else {})
            for _ in scaled(bench, method, seeded, (scale,)):
                score_into(log, bench, "test", key)
        matches = next(line["exact_match"] for line in log.lines if line["key"] == key)
        return float(sum(matches.values()))

    climb(sorted({*SCALED[method], chosen}), chosen, mean_at)


@click.command()
@click.option("--experts", "counts", multiple=True, type=int, default=COUNTS, help="Numbers of experts.")
@click.option("--adapters", multiple=True, type=click.Choice(ADAPTERS), default=ADAPTERS, help="Kinds of experts.")
@click.option("--method", "methods", multiple=True, default=(*CHOSEN, *LEARNED))
@click.option("--seed", "seeds", multiple=True, type=int, default=range(5))
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(os.environ.get("QUALITY_WORKDIR", WORKDIR)))
def main(
    counts: tuple[int, ...], adapters: tuple[str, ...], methods: tuple[str, ...], seeds: tuple[int, ...], workdir: Path
) -> None:
    log = Log(RESULTS / "bench_b.jsonl")
    skills = list(tasks.BENCHES["b"])
    for kind in adapters:
        single_models(log, Bench(workdir, skills[: max(counts)], kind))
        for count in counts:
            bench = Bench(workdir, skills[:count], kind)
            for method in methods:
                if method in CHOSEN:
                    at_scales(log, bench, method)
                for seed in seeds if method in LEARNED else ():
                    try_learned(log, bench, "test", method, {}, seed)


if __name__ == "__main__":
    main()
