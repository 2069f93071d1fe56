"""Measure the memory of trainer and shard at a small size, quickly enough for the test suite: it must not grow with K.

Each figure is the peak anonymous memory of a fresh process that calls the actor as a plain class, imports included. The
task vectors of ten more experts, if a process held them, would add a third.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import models
from models import Models
from report import Report, Target, json_option

from cluster.session import ENVIRONMENT

TOKENS, WINDOW, STEPS = 16, 4, 3
FEW, MANY = 2, 12
GROWTH = 1.02


def trainer(config: Path, gradients: str) -> int:
    """Return the peak anonymous bytes of a trainer over `STEPS` optimiser steps."""
    from step_time import Bench

    from actors.memory import PeakMemory

    # The bench frees its expert before the gauge starts.
    bench = Bench(config, WINDOW, config.parent, [f"gradients={gradients}"])
    gauge = PeakMemory()
    for _ in range(STEPS):
        bench.step()
    return gauge.peak


def shard(config: Path) -> int:
    """Return the peak anonymous bytes of a shard that checks the base, and merges and differentiates every tensor."""
    from actors.memory import PeakMemory
    from actors.shard import Shard
    from engine.codec import pack_all, unpack_all
    from engine.config.reader import load_config
    from engine.learning.learner import first_stage
    from engine.planning.open_models import weight_files
    from engine.planning.planner import make_plan
    from engine.task_vectors.coefficients import Coefficients
    from engine.task_vectors.pieces import pieces

    plan = make_plan(load_config(config), config.parent)
    actor, layout = Shard(plan, 0), first_stage(plan).layout
    coefficients = Coefficients.constant(layout, [0.1] * len(plan.experts))
    gauge = PeakMemory()
    actor.check_base([file.address for file in weight_files(plan.base)])
    for name in plan.merged:
        bucket = list(pieces(name, plan.base_header.tensors[name].shape))
        merged = actor.merge(bucket, {name: coefficients.of(name)})
        actor.gradients(pack_all(unpack_all(merged)), {name: layout.edges_of[name]})
    return gauge.peak


@click.command(help=__doc__)
@click.option("--workdir", default=models.WORKDIR, show_default=True, type=click.Path(path_type=Path))
@json_option()
@click.option(
    "--one", hidden=True, nargs=2, type=str, default=None, help="Measure one role and merge.yaml in this process."
)
def main(workdir: Path, path: Path | None, one: tuple[str, str] | None) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    if one:
        role, config = one
        print(shard(Path(config)) if role == "shard" else trainer(Path(config), role))
        return
    made = Models(workdir.absolute(), "small")
    report = Report(made.describe() | {"tokens": TOKENS, "window": WINDOW, "steps": STEPS})
    roles = {"accumulate": "trainer", "stream": "trainer, gradients: stream", "shard": "shard"}
    for role, name in roles.items():
        peaks = [_peak(made, role, k) for k in (FEW, MANY)]
        report.memory |= {f"{name}, K={k}": peak for k, peak in zip((FEW, MANY), peaks, strict=True)}
        report.targets.append(Target(f"{name}: K={MANY} / K={FEW}", peaks[1] / peaks[0], GROWTH))
    report.finish(path or made.workdir / "results" / "memory_guard.json")


def _peak(made: Models, role: str, k: int) -> int:
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        config = made.write_merge(Path(folder) / "merge.yaml", k, WINDOW, TOKENS)
        command = [sys.executable, __file__, "--one", role, str(config)]
        # The environment of actors: the allocator returns freed memory, which would otherwise look like growth.
        environment = os.environ | ENVIRONMENT
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return int(json.loads(done.stdout))


if __name__ == "__main__":
    main()
