"""Run the checks on one device, without Ray: `python -m gpu_check`, with benchmarks/ and tests/ in PYTHONPATH."""

from __future__ import annotations

import os

# Before torch is imported: cuBLAS reads it when it is loaded.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import tempfile
from pathlib import Path

import click
import tiny
import torch

from gpu_check import correctness, rates
from gpu_check.bench import Bench

FAMILIES = ("llama", "qwen2", "gemma3", "qwen3_moe", "mixtral")
CHECKS = (
    correctness.environment,
    correctness.gradients_under_load,
    correctness.arrivals_under_load,
    correctness.parity,
    correctness.repeats,
    correctness.several_devices_on_one,
    correctness.factors,
    correctness.no_waiting,
    rates.slice_of_a_model,
    rates.reading,
    rates.moving,
    rates.linear_algebra,
    rates.step_with_factors,
    correctness.full_gpu,
)


@click.command(help=__doc__)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--small", is_flag=True, help="Sizes for a CPU.")
@click.option("--only", multiple=True, type=click.Choice([check.__name__ for check in CHECKS]))
@click.option(
    "--family", "families", multiple=True, default=FAMILIES, show_default=True, type=click.Choice(list(tiny.FAMILIES))
)
@click.option("--json", "path", default="gpu_check.json", show_default=True, type=click.Path(path_type=Path))
def main(device: str, small: bool, only: tuple[str, ...], families: tuple[str, ...], path: Path) -> None:
    # The first one makes this process like an actor's.
    checks = [check for check in CHECKS if not only or check.__name__ in only or check is CHECKS[0]]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        bench = Bench(torch.device(device), Path(folder), path, small, families)
        failed = bench.run(checks)
    bench.say(f"{len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
