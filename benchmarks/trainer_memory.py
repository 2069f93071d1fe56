"""Measure the peak anonymous memory of every actor over the number of experts K, next to the in-memory implementation.

Each merge is a `python cli.py merge` on a Ray of its own. Every actor samples its own RssAnon every 20 ms and reports
its peak in merge/memory.json. At the same K and in the same run, the in-memory implementation runs in a process of its
own, which samples itself in the same way. An idle worker shows what a Ray worker takes before it does any work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import merges
import models
import ray
from models import Models
from report import MB, Report, Target, console, in_mb, json_option, print_table

from cluster import session

MERGES = {
    "shard": ["cluster.shards=1"],
    "in trainer": ["cluster.shards=0"],
    "stream": ["cluster.shards=1", "gradients=stream"],
}
IN_MEMORY = {"in-memory": "resident", "in-memory mapped": "mapped"}
ROLES = ("driver", "trainer", "shard", "expert")
# Largest ratio of a trainer's peaks over K, and of a trainer to the in-memory implementation at the largest K.
TRAINER_GROWTH, TRAINER_PART = 1.02, 1 / 15
SHARD_ABOVE_IDLE_BYTES, SHARD_GROWTH = 400e6, 1.05


class Idle:
    """A worker that has imported the modules of a shard and is set up like every actor."""

    def __init__(self) -> None:
        import actors.shard  # noqa: F401
        import engine.task_vectors.streams  # noqa: F401
        from actors.process import ActorProcess

        self.process: Any = ActorProcess("idle")

    def peak(self) -> int:
        time.sleep(1)
        return int(self.process.report().peak_anonymous_bytes)


def idle_worker() -> int:
    """Return the peak anonymous bytes of an idle worker on a Ray started as for a merge."""
    os.environ.pop("RAY_ADDRESS", None)
    with session.connect(None):
        actor = ray.remote(Idle).options(num_cpus=0).remote()
        peak: int = ray.get(actor.peak.remote())
    return peak


def in_memory(config: Path, steps: int, teachers: str, gives_back: bool = True) -> dict[str, Any]:
    """Run in_memory.py and return the JSON that it prints.

    Args:
        config: The merge.yaml.
        steps: Largest number of optimiser steps.
        teachers: `resident` or `mapped`.
        gives_back: Use an allocator that returns all freed memory to the system.
    """
    script = Path(__file__).with_name("in_memory.py")
    command = [sys.executable, str(script), str(config), "--steps", str(steps), "--teachers", teachers]
    # Memory is measured with an allocator that returns all freed memory, without which K = 32 does not fit into 24 GiB.
    # Time is measured with the default allocator: the other one slows down the many temporaries.
    environment = {**merges.ENVIRONMENT, **({"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if gives_back else {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def measure(
    report: Report, path: Path, made: Models, k: int, ways: list[str], window: int, steps: int, tokens: int
) -> None:
    """Measure all variants at one K, one after the other."""
    fastest: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        samples = merges.samples_for(k, window, steps)
        config = made.write_merge(Path(folder) / "merge.yaml", k, samples, tokens, {"gradient_accumulation": window})
        for way in ways:
            began = time.monotonic()
            if way in MERGES:
                merged = merges.run(config, Path(folder) / way.replace(" ", "-"), MERGES[way])
                fastest[way] = min(merged.seconds)
                for role, peak in merged.peaks().items():
                    report.memory[name(way, role, k)] = peak
            else:
                figures = in_memory(config, steps, IN_MEMORY[way])
                fastest[way] = min(figures["step_seconds"])
                report.memory[name(way, "process", k)] = figures["peak_anonymous_bytes"]
            console.print(f"K={k} {way}: {time.monotonic() - began:.0f} s")
            report.save(path)
    for way in MERGES.keys() & fastest.keys():
        if "in-memory" in fastest:
            report.time_ratios[f"fastest step, {way} / in-memory, K={k}"] = fastest[way] / fastest["in-memory"]


def name(way: str, role: str, k: int) -> str:
    return f"{way}: {role}, K={k}"


def add_targets(report: Report, counts: list[int], idle: int) -> None:
    memory, low, high = report.memory, counts[0], counts[-1]
    for way in MERGES:
        trainer = memory.get(name(way, "trainer", high))
        if trainer is None:
            continue
        if low != high:
            growth = trainer / memory[name(way, "trainer", low)]
            report.targets.append(Target(f"{way}: trainer, K={high} / K={low}", growth, TRAINER_GROWTH))
        for other in IN_MEMORY:
            whole = memory.get(name(other, "process", high))
            if whole is not None and other == "in-memory":
                report.targets.append(Target(f"{way}: trainer / {other}, K={high}", trainer / whole, TRAINER_PART))
            elif whole is not None:
                report.other[f"{way}: trainer / {other}, K={high}"] = trainer / whole
        shards = [memory[key] for k in counts if (key := name(way, "shard", k)) in memory]
        if shards:
            above = (max(shards) - idle) / MB
            limit = SHARD_ABOVE_IDLE_BYTES / MB
            report.targets.append(Target(f"{way}: shard above an idle worker, any K, MB", above, limit))
            if low != high:
                growth = max(shards) / min(shards)
                report.targets.append(Target(f"{way}: shard, max / min over K", growth, SHARD_GROWTH))


@click.command(help=__doc__)
@models.options
@click.option("--experts", "-k", multiple=True, default=[2, 4, 8, 16, 32], show_default=True, type=click.IntRange(1))
@click.option(
    "--without",
    multiple=True,
    type=click.Choice([*MERGES, *IN_MEMORY]),
    help="A variant to leave out; may be given several times.",
)
@click.option("--window", default=8, show_default=True, type=click.IntRange(1), help="Samples per optimiser step.")
@click.option("--steps", default=4, show_default=True, type=click.IntRange(1), help="Least number of optimiser steps.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2), help="Tokens per sample.")
@json_option()
def main(
    workdir: Path,
    size: str,
    dtype: str,
    own_heads: bool,
    experts: tuple[int, ...],
    without: tuple[str, ...],
    window: int,
    steps: int,
    tokens: int,
    path: Path | None,
) -> None:
    made = Models(workdir.absolute(), size, dtype, own_heads)
    counts = sorted(set(experts))
    ways = [way for way in (*MERGES, *IN_MEMORY) if way not in without]
    settings = {"experts": counts, "window": window, "steps": steps, "tokens": tokens, "ways": ways}
    report = Report(made.describe() | settings)
    console.print(report.settings)
    report.memory["idle worker"] = idle = idle_worker()
    path = path or made.workdir / "results" / "trainer_memory.json"
    for k in counts:
        measure(report, path, made, k, ways, window, steps, tokens)
    keys = [(way, role) for way in ways for role in (ROLES if way in MERGES else ("process",))]
    rows = {f"{way}: {role}": [report.memory.get(name(way, role, k)) for k in counts] for way, role in keys}
    cells = {row: [in_mb(peak) for peak in peaks] for row, peaks in rows.items() if any(peaks)}
    cells["idle worker"] = [in_mb(idle)] * len(counts)
    print_table("peak anonymous memory, MB", [f"K={k}" for k in counts], cells)
    for what, ratio in {**report.time_ratios, **report.other}.items():
        console.print(f"{what}: {ratio:.3g}")
    add_targets(report, counts, idle)
    report.finish(path)


if __name__ == "__main__":
    main()
