"""Run merges on one GPU with Ray, by the command line: `python -m gpu_check.on_ray`.

Actors take their devices from their seats, share a GPU in parts and in turns, and repeat themselves bit for bit, also
if the trainer is killed. PYTHONPATH: the repository, tests/ and benchmarks/.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet
import ray
import tiny
import torch
from merges import ENVIRONMENT, ROOT, arguments
from processes import descendants, kill, titled

from gpu_check.bench import Bench

# Parts of one GPU for trainer and experts, and the seats of a run on CPUs.
PARTS = ("cluster.trainer.num_gpus=0.5", "cluster.expert.num_gpus=0.25")
ON_CPUS = ("cluster.trainer.num_gpus=0", "cluster.expert.num_gpus=0")
SHOW_ALL = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
# Seconds to wait for a step of a merge, and for a whole merge.
STEP, MERGE = 300, 600


@dataclass(frozen=True)
class Result:
    """A finished merge: its coefficients, the SHA-256 of its weights, and merge/memory.json."""

    coefficients: Any
    weights: str
    memory: dict[str, Any]


@dataclass
class Merges(Bench):
    """Merges of one config, each into a folder of its own; `first` is the one with which others are compared."""

    config: Path = Path()
    count: int = 0
    first: Result | None = None

    def merge(self, *settings: str, more: Mapping[str, str] | None = None, killing: bool = False) -> Result:
        """Run a merge in a process of its own; `killing`: its trainer is killed after two steps."""
        self.count += 1
        out = self.folder / f"merged{self.count}"
        command = [sys.executable, str(ROOT / "cli.py"), *arguments(self.config, out, settings)]
        began = time.monotonic()
        with open(f"{out}.log", "w+") as log:
            running = subprocess.Popen(command, env={**ENVIRONMENT, **(more or {})}, stdout=log, stderr=log)
            try:
                if killing:
                    self._kill_trainer(running, out.with_name(f"{out.name}.run"))
                running.wait(MERGE)
            finally:
                running.kill()
            log.seek(0)
            if running.returncode:
                raise RuntimeError(f"{' '.join(settings)} ended with {running.returncode}:\n{log.read()[-3000:]}")
        self.fact(f"merge {self.count}, {' '.join(settings) or 'auto'}: s", time.monotonic() - began)
        table = pyarrow.parquet.read_table(out / "merge" / "coefficients.parquet")
        weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        memory = json.loads((out / "merge" / "memory.json").read_text())
        return Result(np.array(table["value"].to_pylist()), weights, memory)

    def _kill_trainer(self, running: subprocess.Popen[bytes], state: Path) -> None:
        until = time.monotonic() + STEP
        while not (state / "metrics" / "1-000002.json").exists():
            if running.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the merge took no second step")
            time.sleep(0.02)
        found = titled("ray::Trainer", descendants(running.pid))
        self.expect("trainers that could not be killed", 1 - len(found), 0)
        kill(found)

    def expect_near(self, name: str, one: Result) -> None:
        assert self.first is not None
        self.expect(f"{name}: coefficients differ by", np.abs(one.coefficients - self.first.coefficients).max(), 2e-3)


class Seat:
    """An actor that says on what it computes."""

    def device(self) -> str:
        from actors.process import ActorProcess

        return str(ActorProcess("check").device)


def no_gpu(merges: Merges) -> None:
    """An actor that asks for no GPU computes on the CPU, although its node has one"""
    ray.init(num_gpus=int(merges.on_gpu), include_dashboard=False, log_to_driver=False)
    try:
        seat = ray.remote(Seat).options(num_gpus=0).remote()
        merges.expect("on a GPU", ray.get(seat.device.remote()) != "cpu", 0)
    finally:
        ray.shutdown()


def parts(merges: Merges) -> None:
    """Trainer and experts on parts of one GPU learn what they learn on CPUs"""
    merges.first = merges.merge(*(PARTS if merges.on_gpu else ON_CPUS))
    merges.fact("actors", merges.first.memory["actors"])
    merges.fact("seconds by phase", merges.first.memory["seconds"])
    if merges.on_gpu:
        merges.expect_near("on CPUs", merges.merge(*ON_CPUS))


def same_bits(merges: Merges) -> None:
    """Two runs, one with the trainer killed after two steps, have the same bits"""
    ways = [("again", False)] if merges.on_gpu else []
    for name, killing in (*ways, ("with the trainer killed", True)):
        one = merges.merge(*(PARTS if merges.on_gpu else ON_CPUS), killing=killing)
        assert merges.first is not None
        merges.expect(f"{name}: weights differ", one.weights != merges.first.weights, 0)
        merges.expect_near(name, one)


def in_turns(merges: Merges) -> None:
    """Experts and trainer take turns on one GPU, which needs the memory of those that end; all GPUs may be visible"""
    if not merges.on_gpu:
        return merges.skip("in_turns")
    for name, more in (("in turns", {}), ("with all GPUs visible", SHOW_ALL)):
        merges.expect_near(name, merges.merge(more=more))


@click.command(help=__doc__)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--json", "path", default="gpu_check_ray.json", show_default=True, type=click.Path(path_type=Path))
def main(device: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        parameters = {"epochs": 16, "weight": 0.3}
        made = tiny.make_merge(Path(folder) / "models", merge_method="expert_merging", parameters=parameters)
        merges = Merges(torch.device(device), Path(folder), path, config=made)
        failed = merges.run((no_gpu, parts, same_bits, in_turns))
    merges.say(f"{len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
