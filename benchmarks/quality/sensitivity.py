"""Measure how Expert Merging++ depends on samples, budget, κ and number of experts, on the validation split.

`python benchmarks/quality/sensitivity.py [samples budget kappa experts]` varies one of them at a time around the
options of `space.CHOSEN_LEARNED` for orthogonal task vectors. It appends a line to `results/sensitivity.jsonl` for each
point not there yet.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import tasks
from bench import Bench
from choose import RESULTS, Log, try_learned
from fine_tune import WORKDIR
from space import CHOSEN_LEARNED

from engine.methods.learned import Parameters

POINTS = {
    "samples": (2, 5, 8, 10, 20),
    "budget": (0.9, 1.1, 3.0, 8.0),
    "kappa": (0.0, 1.0, 2.0),
    "experts": (2, 3, 4, 5),
}
# The values of the quantities that are not varied.
DEFAULTS = Parameters()
AROUND = {
    "samples": DEFAULTS.samples_per_model,
    "budget": DEFAULTS.budget,
    "kappa": DEFAULTS.kappa,
    "experts": len(tasks.BENCHES["a"]),
}


@click.command()
@click.argument("what", nargs=-1, type=click.Choice(list(POINTS)))
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,))
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(os.environ.get("QUALITY_WORKDIR", WORKDIR)))
def main(what: tuple[str, ...], seeds: tuple[int, ...], workdir: Path) -> None:
    log = Log(RESULTS / "sensitivity.jsonl")
    method, options = CHOSEN_LEARNED["expert_merging_pp, task_vectors: orthogonal"]
    benches: dict[int, Bench] = {}
    for name in what or POINTS:
        for value in POINTS[name]:
            experts = int(value if name == "experts" else AROUND["experts"])
            if experts not in benches:
                benches[experts] = Bench(workdir, list(tasks.BENCHES["a"])[:experts])
            # A default is left out of the options, so that the common point of all curves is computed once.
            varied = options | ({name: value} if name in ("budget", "kappa") and value != AROUND[name] else {})
            samples = int(value if name == "samples" else AROUND["samples"])
            for seed in seeds:
                try_learned(log, benches[experts], "validation", method, varied, seed, samples)


if __name__ == "__main__":
    main()
