"""Score every method on the test split and append a line to `results/test.jsonl` per model and seed not there yet.

`python benchmarks/quality/compare.py [NAME ...]` uses the options found with `choose.py` (`space.CHOSEN`). Methods that
depend on chance (the calibration samples drawn, the elements that DARE keeps) are run with five seeds.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
from bench import Bench
from choose import RESULTS, Log, scaled, score_into, try_learned
from fine_tune import MIXTURES, WORKDIR
from space import CHOSEN, CHOSEN_LEARNED, SEEDED

SEEDS = range(5)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seed", "seeds", multiple=True, type=int, default=SEEDS)
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(os.environ.get("QUALITY_WORKDIR", WORKDIR)))
def main(names: tuple[str, ...], seeds: tuple[int, ...], workdir: Path) -> None:
    bench, log = Bench(workdir), Log(RESULTS / "test.jsonl")
    single = ["base", *bench.skills, MIXTURES["a"]]
    for name in names or [*single, *CHOSEN, *CHOSEN_LEARNED]:
        if name in single and not log.has(model=name, **bench.which):
            bench.load(name)
            score_into(log, bench, "test", {"model": name} | bench.which)
        if name in CHOSEN:
            options, scale = CHOSEN[name]
            for seed in seeds if name in SEEDED else (0,):
                key = {"method": name, "options": options, "scale": scale, "seed": seed} | bench.which
                if not log.has(**key):
                    for _ in scaled(bench, name, options, (scale,), seed):
                        score_into(log, bench, "test", key)
        if name in CHOSEN_LEARNED:
            method, options = CHOSEN_LEARNED[name]
            for seed in seeds:
                try_learned(log, bench, "test", method, options, seed)


if __name__ == "__main__":
    main()
