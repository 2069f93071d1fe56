"""Merge through the real command line: for what the bench does not run, and for what a merge takes.

`python benchmarks/quality/command_line.py [ROW ...]` merges every row of the comparison (`space.CHOSEN`,
`CHOSEN_LEARNED`) once, without a score, if `results/costs.jsonl` does not have it. Every merge of this module appends a
line there: seconds of the whole command, memory of the largest process in bytes, and what came from the cache of
earlier merges, which are fewer seconds than a first merge takes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from bench import Bench
from fine_tune import WORKDIR
from space import CHOSEN, CHOSEN_LEARNED, SAMPLED, Options

ROOT = Path(__file__).resolve().parents[2]
COSTS = Path(__file__).resolve().parent / "results" / "costs.jsonl"
LEARNED_IN_BENCH = ("expert_merging", "expert_merging_pp", "adamerging")


def in_bench(method: str, options: Mapping[str, Any]) -> bool:
    """Return whether the bench can merge this in its own process: no statistics and no steps after the merge."""
    of_statistics = method in SAMPLED or options.get("weight") == "closed_form"
    return not of_statistics and not options.get("calibrate")


def costs() -> list[dict[str, Any]]:
    """Return the lines of `results/costs.jsonl`."""
    return [json.loads(line) for line in COSTS.read_text().splitlines()] if COSTS.exists() else []


@contextmanager
def merged(bench: Bench, method: str, options: Options, seed: int = 0, samples: int = 8) -> Iterator[Path]:
    """Merge through the command line, log what it took, and give the folder of the model, which is removed afterwards.

    Raises:
        subprocess.CalledProcessError: The merge failed; it has said why.
    """
    config, overrides = bench.config(method, options, seed, samples)
    shared = [f"cache={bench.workdir / 'cache'}", "cache_size=9GB", "out_dtype=float32"]
    given = [part for override in (*overrides, *shared) for part in ("--set", override)]
    with tempfile.TemporaryDirectory(dir=bench.workdir, prefix="merge-") as scratch:
        out = Path(scratch, "out")
        command = [sys.executable, str(ROOT / "cli.py"), "merge", str(config), "--out", str(out), *given]
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = round(time.monotonic() - began, 1)
        memory = json.loads((out / "merge" / "memory.json").read_text(encoding="utf-8"))
        line = {
            "key": {"method": method, "options": options} | bench.which,
            "seed": seed,
            "samples": samples,
            "seconds": seconds,
            "peak": max(actor["peak_anonymous_bytes"] for actor in memory["actors"]),
            "reused": memory["reused"],
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "load": round(os.getloadavg()[1], 1),
            "machine": platform.processor() or platform.machine(),
        }
        with open(COSTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        yield out


@click.command()
@click.argument("rows", nargs=-1)
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(os.environ.get("QUALITY_WORKDIR", WORKDIR)))
def main(rows: tuple[str, ...], workdir: Path) -> None:
    bench = Bench(workdir)
    weight_space = {name: (name, options) for name, (options, _) in CHOSEN.items()}
    for name, (method, options) in (weight_space | CHOSEN_LEARNED).items():
        key = {"method": method, "options": options} | bench.which
        if name in (rows or (name,)) and not any(line["key"] == key for line in costs()):
            with merged(bench, method, options):
                pass


if __name__ == "__main__":
    main()
