"""Compare the scaling model (docs/scaling.md) with measured runs, and print its estimates for 7B and 70B models.

`check` derives the machine's rates (compute, memory, streaming, exchange) from four merges. It then predicts further
merges, over K, M, tokens, shards and `gradients`, and runs them: peak anonymous memory of trainer and shard, bytes per
step, and the least seconds per step, scaled to the machine's pace in the first run. `large` writes the headers of a 7B
and of a 70B Llama (sparse files, which take no disk space) and prints `cli.py plan` for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click
import large_models
import merges
import models
from models import Models
from report import Report, Target, console, in_mb, json_option, print_table

from engine.config.reader import load_config
from engine.planning.costs.rates import GB, Prediction, Site
from engine.planning.costs.scaling import Machines, Work, predict
from engine.planning.planner import make_plan

WINDOW, STEPS = 8, 5
# Largest relative difference of a prediction from the measurement.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Run:
    """The settings of one merge; `shards`, `gradients` and `batch_tokens` as in the config."""

    size: str
    k: int
    tokens: int = 64
    shards: int = 0
    gradients: str = "accumulate"
    batch_tokens: int = merges.BATCH_TOKENS

    @property
    def name(self) -> str:
        batch = f"{self.tokens} tokens, {self.batch_tokens} a pass"
        return f"{self.size}, K={self.k}, {batch}, shards={self.shards}, {self.gradients}"


FEW, MANY, SHARDED = Run("standard", 2), Run("standard", 32), Run("standard", 2, shards=1)
ALONE = Run("standard", 2, batch_tokens=1)
CHECKED = (
    Run("standard", 8),
    Run("standard", 16),
    Run("standard", 4, tokens=128),
    Run("standard", 8, shards=1),
    Run("standard", 16, shards=2),
    Run("standard", 4, tokens=16),
    Run("standard", 4, shards=1, gradients="stream"),
    Run("small", 64),
)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, peak bytes of trainer and shard, and bytes transferred per step."""

    step: float
    trainer: int
    shard: int
    moved: float


class Bench:
    """Runs and predicts merges on this machine."""

    def __init__(self, workdir: Path) -> None:
        self.workdir, self.machines = workdir, Machines.here()
        self.pace = 0.0

    def at_one_pace(self, run: Run) -> Measured:
        """Measure a run next to one of FEW, and scale its step to the machine's pace in the first run of FEW.

        The speed of a shared machine differs by a quarter from one minute to the next.
        """
        beside, seen = self.measure(FEW).step, self.measure(run)
        self.pace = self.pace or beside
        console.print(f"{run.name}: {seen.step:.3f} s, beside it {FEW.name}: {beside:.3f} s")
        return replace(seen, step=seen.step * self.pace / beside)

    def measure(self, run: Run) -> Measured:
        with tempfile.TemporaryDirectory(dir=self.workdir) as folder:
            merged = merges.run(self._config(run, Path(folder)), Path(folder) / "out", self._settings(run))
        peaks, memory = merged.peaks(), merged.memory
        moved = memory["bytes_trainer_to_shards"] + memory["bytes_shards_to_trainer"]
        # The first step also loads the model and reads every file for the first time. Of the other steps, the least:
        # slow periods of a shared machine last longer than a run, so a median would include them.
        step = min(merged.seconds[1:])
        return Measured(step, peaks["trainer"], peaks["shard"], moved / len(merged.seconds))

    def predict(self, run: Run, rates: dict[str, float]) -> Prediction:
        with tempfile.TemporaryDirectory(dir=self.workdir) as folder:
            config = self._config(run, Path(folder))
            given = [f"cluster.rates.{name}={value}" for name, value in rates.items()]
            plan = make_plan(load_config(config, [*self._settings(run), *given]), config.parent)
        samples = merges.samples_for(run.k, WINDOW, STEPS)
        work = Work.of(plan.config, [[run.tokens] * samples] * run.k, run.batch_tokens)
        where: Site = "node" if run.shards else "trainer"
        return predict(plan, work, self.machines, where)

    def rates(self) -> dict[str, float]:
        """Return the rates at which the model agrees with FEW and three runs that differ from it in one setting."""
        runs = (MANY, SHARDED, ALONE)
        endless = dict.fromkeys(("compute_tflops", "memory_gbs", "stream_gbs", "exchange_gbs"), 1e30)
        taken = dict(zip(runs, (self.at_one_pace(run).step for run in runs), strict=True)) | {FEW: self.pace}
        # Subtract the part of a step that depends on no rate.
        taken = {run: step - self.predict(run, endless).step.total for run, step in taken.items()}

        # With one rate at one unit and all others infinite, the step is the amount of work behind that rate.
        def amount(run: Run, rate: str, one: float) -> float:
            return self.predict(run, endless | {rate: one}).step.total

        streamed = {run: amount(run, "stream_gbs", 1 / GB) for run in (FEW, MANY)}
        passed = {run: amount(run, "memory_gbs", 1 / GB) for run in (FEW, ALONE)}
        stream = (streamed[MANY] - streamed[FEW]) / (taken[MANY] - taken[FEW])
        memory = (passed[ALONE] - passed[FEW]) / (taken[ALONE] - taken[FEW])
        exchange = amount(SHARDED, "exchange_gbs", 1 / GB) / (taken[SHARDED] - taken[FEW])
        rest = taken[FEW] - streamed[FEW] / stream - passed[FEW] / memory
        compute = amount(FEW, "compute_tflops", 1e-12) / rest
        return {
            "compute_tflops": compute / 1e12,
            "memory_gbs": memory / GB,
            "stream_gbs": stream / GB,
            "exchange_gbs": exchange / GB,
        }

    def _config(self, run: Run, folder: Path) -> Path:
        made = Models(self.workdir, run.size)
        samples = merges.samples_for(run.k, WINDOW, STEPS)
        return made.write_merge(folder / "merge.yaml", run.k, samples, run.tokens, {"gradient_accumulation": WINDOW})

    def _settings(self, run: Run) -> list[str]:
        given = {"cluster.shards": run.shards, "gradients": run.gradients, "batch_tokens": run.batch_tokens}
        return [f"{key}={value}" for key, value in given.items()]


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--workdir", default=models.WORKDIR, show_default=True, type=click.Path(path_type=Path))
@json_option()
def check(workdir: Path, path: Path | None) -> None:
    """Compare predictions with measured merges."""
    workdir = workdir.absolute()
    bench = Bench(workdir)
    path = path or workdir / "results" / "scaling.json"
    rates = bench.rates()
    console.print("rates from four runs:", {name: round(value, 4) for name, value in rates.items()})
    report = Report({"window": WINDOW, "steps": STEPS, "rates": rates})
    rows = {}
    for run in CHECKED:
        predicted, seen = bench.predict(run, rates), bench.at_one_pace(run)
        pairs = {
            "step": (predicted.step.total, seen.step),
            "trainer": (predicted.memory.trainer, seen.trainer),
            "shard": (predicted.memory.shard, seen.shard),
            "moved": (predicted.moved, seen.moved),
        }
        rows[run.name] = [f"{seen.step:.2f} / {predicted.step.total:.2f}"]
        rows[run.name] += [f"{in_mb(saw)} / {in_mb(says)}" for says, saw in list(pairs.values())[1:]]
        console.print(run.name, rows[run.name])
        for what, (says, saw) in pairs.items():
            away = abs(says / saw - 1) if saw else abs(says)
            report.other[f"{run.name}: {what}, predicted / measured"] = says / saw if saw else 1 + says
            report.targets.append(Target(f"{run.name}: {what}, predicted away from measured", away, TOLERANCE))
        report.memory |= {f"{run.name}: trainer": seen.trainer, f"{run.name}: shard": seen.shard}
        report.save(path)
    print_table("measured / predicted", ["step s", "trainer MB", "shard MB", "moved MB"], rows)
    report.finish(path)


@main.command()
@click.option(
    "--cli", default=merges.ROOT / "cli.py", type=click.Path(path_type=Path), help="Another version's cli.py."
)
def large(cli: Path) -> None:
    """Print the plans of merges of 7B and 70B experts with the default options."""
    asked = (("7B", 8, 1), ("7B", 32, 4), ("70B", 100, 16))
    with tempfile.TemporaryDirectory() as folder:
        for size, k, nodes in asked:
            config = large_models.write_merge(Path(folder) / f"{k}x{size}", large_models.SHAPES[size], k)
            # Typical rented nodes: 96 cores, 2 TB, 8 GPUs of 80 GB, a network of 100 Gbit/s.
            settings = ["--set", "cluster.rates.network_gbs=12"]
            if size == "70B":
                given = ("cluster.trainer.num_gpus=8", "cluster.expert.num_gpus=2", "gradient_checkpointing=true")
                settings += [word for setting in given for word in ("--set", setting)]
            machines = ["--nodes", str(nodes), "--cpus", "96", "--gpus", "8", "--memory", "2000", "--gpu-memory", "80"]
            command = [sys.executable, str(cli), "plan", str(config), *machines, *settings]
            wide = os.environ | {"COLUMNS": "120"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=wide)
            # Leave out the plan's facts and its list of experts, which are artificial here.
            console.print(
                f"{k} experts of {size} on {nodes} nodes\n", done.stdout[done.stdout.index("  task vectors") :]
            )


if __name__ == "__main__":
    main()
