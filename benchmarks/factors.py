"""Measure merging through factors of orthogonal task vectors next to dense ones: space, step time, memory, traffic.

For each number of experts K, the orthogonal task vectors of a random Llama are stored both ways, and a trainer takes
optimiser steps with each, called as a plain class in a process of its own:
- `stored`: bytes of the files over M, the bytes of the merged tensors;
- `step`: the median seconds of a step; the processes of all K run in turns, round after round;
- `memory`: the trainer's peak anonymous memory;
- `moved`: bytes between trainer and shards in a step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import click
import models
from models import Models
from report import Report, Target, console, json_option, print_table

from cluster.session import ENVIRONMENT
from engine.config.resources import Use

TOKENS, WINDOW, STEPS = 64, 4, 3
WAYS: dict[str, Use] = {"factors": "always", "dense": "never"}
STORED, STEP, MEMORY = 2.1, 1.1, 1.05


def store(config: Path, use: Use) -> int:
    """Store the orthogonal task vectors of a merge beside its config, and return the bytes of the files."""
    from engine.config.reader import load_config
    from engine.machine import usable_cpus
    from engine.planning.factors import factored
    from engine.planning.open_models import open_task_vectors
    from engine.planning.planner import make_plan
    from engine.shards.orthogonal import FOLDER, orthogonalise
    from engine.storage.local_folder import LocalFolder

    plan, state = make_plan(load_config(config), config.parent), LocalFolder(config.parent / use)
    streams = open_task_vectors(plan, usable_cpus())
    for name in plan.orthogonal:
        orthogonalise(plan, streams, state, [name], factored(plan, False, use))
    return sum(file.stat().st_size for file in (config.parent / use / FOLDER).iterdir())


def steps(config: Path, use: Use) -> dict[str, Any]:
    """Take optimiser steps, and return the seconds of each but the first, peak memory, and bytes moved."""
    from step_time import Bench

    from actors.memory import PeakMemory
    from actors.trainer import Trainer
    from engine.machine import usable_cpus
    from engine.planning.factors import factored
    from engine.shards.factor_shards import FactorShards
    from engine.shards.local_shards import LocalShards
    from engine.shards.protocol import Shards
    from engine.storage.local_folder import LocalFolder

    bench = Bench(config, WINDOW, config.parent)
    plan, state = bench.plan, LocalFolder(config.parent / use)
    through = factored(plan, False, use)
    shards: Shards = LocalShards(plan, usable_cpus(), False, state, plan.merged_set.difference(through))
    if through:
        shards = FactorShards(plan, through, shards, state)
    bench.trainer = Trainer(plan, shards, lambda target: target)
    gauge, seconds = PeakMemory(), []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        bench.step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "peak": gauge.peak, "moved": sum(shards.traffic().values())}


def _child(action: str, config: Path, use: Use) -> Any:
    command = [sys.executable, __file__, "--one", action, str(config), use]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(report: Report, made: Models, counts: list[int], rounds: int, folder: Path) -> None:
    """Measure all K both ways, and add figures and targets to the report."""
    configs, stored = {}, {}
    item = {"float32": 4, "bfloat16": 2}[made.dtype]
    merged = item * sum(n for name, n in made.elements().items() if not any(p in name for p in models.NOT_MERGED))
    for k in counts:
        (folder / str(k)).mkdir()
        parameters = {"task_vectors": "orthogonal"}
        configs[k] = made.write_merge(folder / str(k) / "merge.yaml", k, -(-WINDOW // k), TOKENS, parameters)
        for way, use in WAYS.items():
            stored[way, k] = _child("store", configs[k], use) / merged
    taken: dict[tuple[str, int], list[Any]] = {(way, k): [] for way in WAYS for k in counts}
    for _ in range(rounds):
        for (way, k), found in taken.items():
            found.append(_child("steps", configs[k], WAYS[way]))
    rows, step, memory = {}, {}, {}
    for way, k in taken:
        found = taken[way, k]
        step[way, k] = statistics.median(seconds for one in found for seconds in one["seconds"])
        memory[way, k] = min(one["peak"] for one in found)
        moved = max(one["moved"] for one in found)
        cells = [f"{stored[way, k]:.2f}", f"{step[way, k]:.3f}", f"{memory[way, k] / 1e6:.0f}", f"{moved}"]
        rows[f"{way}, K={k}"] = cells
        report.memory[f"trainer, {way}, K={k}"] = memory[way, k]
        report.other[f"stored / M, {way}, K={k}"] = stored[way, k]
        report.other[f"step s, {way}, K={k}"] = step[way, k]
    print_table(f"M = {merged / 1e6:.1f} MB", ["stored / M", "step s", "trainer MB", "moved"], rows)
    low, high = counts[0], counts[-1]
    report.time_ratios |= {f"step, {way}, K={high} / K={low}": step[way, high] / step[way, low] for way in WAYS}
    report.targets += [Target(f"stored / M, factors, K={k}", stored["factors", k], STORED) for k in counts]
    report.targets += [
        Target(f"step, factors, K={high} / K={low}", step["factors", high] / step["factors", low], STEP),
        Target(f"trainer, factors, K={high} / K={low}", memory["factors", high] / memory["factors", low], MEMORY),
    ]


@click.command(help=__doc__)
@models.options
@click.option("--experts", "-k", multiple=True, default=[2, 4, 8, 32], show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@json_option()
@click.option("--one", hidden=True, nargs=3, type=str, default=None, help="An action, merge.yaml and a way.")
def main(
    workdir: Path,
    size: str,
    dtype: str,
    own_heads: bool,
    experts: tuple[int, ...],
    rounds: int,
    path: Path | None,
    one: tuple[str, str, Use] | None,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    if one:
        action, config, use = one
        assert use in get_args(Use)
        print(json.dumps({"store": store, "steps": steps}[action](Path(config), use)))
        return
    made, counts = Models(workdir.absolute(), size, dtype, own_heads), sorted(set(experts))
    report = Report(made.describe() | {"experts": counts, "rounds": rounds, "window": WINDOW, "tokens": TOKENS})
    console.print(report.settings)
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        measure(report, made, counts, rounds, Path(folder))
    report.finish(path or made.workdir / "results" / "factors.json")


if __name__ == "__main__":
    main()
