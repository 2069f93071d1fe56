"""Compare merges of this engine with FusionBench's of the same models, statistics and options.

FusionBench runs in an environment of its own, whose Python `--python` names (benchmarks/README.md says how to make it).
A tiny Llama and experts that differ from it in every tensor are merged by both, this engine's side by `python cli.py`.
The Fisher information and Gram matrices are this engine's; FusionBench collects them for CLIP and GPT-2 only. A figure
is the largest difference of two elements as a share of the largest element of a task vector.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import merges
import models
import torch
import yaml
from models import Models
from report import Report, Target, json_option, print_table
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.statistics.files import Statistics
from engine.storage.local_folder import LocalFolder

Tensors = dict[str, Tensor]
EXPERTS, SAMPLES, TOKENS = 3, 8, 64
# Rounding of float32 weights that are a hundred times the task vectors, or that an iteration amplifies.
CLOSE = 1e-3


@dataclass(frozen=True)
class Case:
    """A merge by both.

    Attributes:
        method: Of this engine.
        options: What both sides are given.
        parameters: The parameters of this engine's config where they are not the options.
        calibrate: Its steps after the merge.
        experts: The number of experts.
        same: Names of the tensors that both merge by the method.
        differs: Why the merges are not the same.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] | None = None
    calibrate: dict[str, Any] | None = None
    experts: int = EXPERTS
    same: Callable[[str], bool] = lambda name: True
    differs: str = ""


class Related(Models):
    """Experts whose task vectors have a part in common, so that they meet at angles other than right ones."""

    @property
    def folder(self) -> Path:
        return super().folder.with_suffix(".related")

    def _write_expert(self, folder: Path, index: int) -> None:
        super()._write_expert(folder, index)
        file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
        own = load_file(file)
        common = {name: torch.randn(own[name].shape, generator=generator) * models.NOISE for name in sorted(own)}
        save_file({name: tensor + common[name] for name, tensor in own.items()}, file, metadata={"format": "pt"})


def in_blocks(name: str) -> bool:
    return ".layers." in name


def is_layer(name: str) -> bool:
    return in_blocks(name) and "norm" not in name


def one_more(density: float, elements: int) -> float:
    """Return the density at which this engine keeps ⌊density·n⌋ + 1 of n elements, as FusionBench does."""
    return (math.floor(density * elements) + 1.5) / elements


def cases(base: Tensors) -> dict[str, Case]:
    elements = sum(tensor.numel() for tensor in base.values())
    of_layers = sum(tensor.numel() for name, tensor in base.items() if is_layer(name))
    ties, doge = {"density": 0.2}, {"eta": 0.07, "density": 0.3, "subspace": 6, "steps": 400}
    as_theirs = {"weight": 1.0, "trim": "model", "divide_by": "count"}
    return {
        "weight_average": Case("weight_average"),
        "task_arithmetic": Case("task_arithmetic", {"weight": 0.3}),
        "ties": Case("ties", ties, {**as_theirs, "density": one_more(0.2, elements)}),
        "slerp": Case("slerp", {"t": 0.4}, experts=1),
        "model_stock": Case("model_stock", differs="FusionBench averages angles, we and mergekit their cosines"),
        "model_stock, two experts": Case("model_stock", experts=2),
        "iso": Case("iso"),
        "svd": Case("svd"),
        "wudi": Case("wudi", {"steps": 300}),
        "doge": Case("doge", doge, doge | {"density": one_more(0.3, of_layers)}, same=is_layer),
        "svc": Case(
            "task_arithmetic", {"weight": 0.3, "alpha": 0.1}, {"weight": 0.3}, {"method": "svc", "alpha": 0.1},
            same=in_blocks,
        ),
        "fisher, no floor": Case("fisher", {"floor": 0.0}),
        "fisher": Case("fisher", {"floor": 1e-6}, differs="FusionBench adds the floor before it divides by the norm"),
        "regmean": Case("regmean", {"alpha": 0.5}, {"alpha": 0.5, "domain": "weight"}),
        "regmean_plus_plus": Case("regmean_plus_plus", {"alpha": 0.5}, same=in_blocks),
    }  # fmt: skip


def call(*command: object) -> None:
    done = subprocess.run([*map(str, command)], env=merges.ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def write_config(path: Path, made: Models, case: Case, statistics: Path | None) -> Path:
    entries: list[dict[str, Any]] = []
    for k in range(case.experts):
        entry: dict[str, Any] = {"model": str(made.expert(k))}
        if case.method == "regmean_plus_plus" or statistics is None:
            entry["calibration"] = str(made.calibration(k, SAMPLES, TOKENS))
        elif case.method in ("fisher", "regmean"):
            entry["statistics"] = str(statistics / made.expert(k).name)
        entries.append(entry)
    config = {"merge_method": case.method, "base_model": str(made.base()), "models": entries, "dtype": made.dtype}
    parameters = case.options if case.parameters is None else case.parameters
    config["parameters"] = parameters | ({"samples_per_model": SAMPLES} if "calibration" in entries[0] else {})
    path.write_text(yaml.safe_dump(config | ({"calibrate": case.calibrate} if case.calibrate else {})))
    return path


def collect(made: Models, base: Tensors) -> Path:
    """Write the experts' statistics, as this engine reads them and as safetensors, and return their folder."""
    folder = made.folder / "statistics"
    if not folder.exists():
        config = write_config(made.folder / "statistics.yaml", made, Case("fisher"), None)
        call(sys.executable, merges.ROOT / "cli.py", "stats", config, "--out", folder, "--kinds", "gram,fisher")
    found: Tensors = {}
    for k in range(EXPERTS):
        of_expert = Statistics(LocalFolder(folder / made.expert(k).name))
        for name, tensor in base.items():
            of = of_expert.of(name, tensor.shape)
            if (information := of.fisher()) is not None:
                found[f"fisher.{k}.{name}"] = information
            if (moments := of.moments()) is not None:
                found[f"gram.{k}.{name.removesuffix('.weight')}"] = moments.gram() / moments.tokens
    save_file(found, made.folder / "statistics.safetensors")
    return folder


def difference(ours: Tensors, theirs: Tensors, case: Case, largest: float) -> tuple[int, float]:
    """Return the number of tensors, and the largest difference of an element as a share of `largest`."""
    names = [name for name in ours if name in theirs and case.same(name)]
    apart = [float((ours[name].double() - theirs[name].double()).abs().max()) for name in names]
    return len(names), (math.nan if any(map(math.isnan, apart)) else max(apart)) / largest


@click.command(help=__doc__)
@click.option("--python", required=True, type=click.Path(path_type=Path, exists=True), help="Has FusionBench.")
@click.option("--workdir", default=models.WORKDIR, show_default=True, type=click.Path(path_type=Path))
@json_option()
def main(python: Path, workdir: Path, path: Path | None) -> None:
    made = Related(workdir.absolute(), "tiny", own_heads=True)
    folders = [made.base(), *(made.expert(k) for k in range(EXPERTS))]
    base, *experts = (load_file(folder / "model.safetensors") for folder in folders)
    chosen, statistics = cases(base), collect(made, base)
    records = [made.calibration(k, SAMPLES, TOKENS).read_text().splitlines() for k in range(EXPERTS)]
    settings = {
        "experts": EXPERTS,
        "options": {name: case.options for name, case in chosen.items()},
        "samples": [[json.loads(line)["input_ids"] for line in of] for of in records],
    }
    (made.folder / "settings.json").write_text(json.dumps(settings))
    call(python.absolute(), Path(__file__).with_name("fusion_bench_merges.py"), made.folder)
    largest = max(float((own[name] - base[name]).abs().max()) for own in experts for name in base)
    report, rows = Report(made.describe() | settings["options"]), {}
    for name, case in chosen.items():
        config = write_config(made.folder / f"{name}.yaml", made, case, statistics)
        out = made.folder / "ours" / name
        call(sys.executable, merges.ROOT / "cli.py", *merges.arguments(config, out, []), "--fresh")
        ours: Tensors = {}
        for file in out.glob("*.safetensors"):
            ours |= load_file(file)
        theirs = load_file(made.folder / "theirs" / f"{name}.safetensors")
        count, apart = difference(ours, theirs, case, largest)
        rows[name] = [str(count), f"{apart:.1e}", case.differs]
        report.other[name] = apart
        if not case.differs:
            report.targets.append(Target(name, apart, CLOSE))
    print_table("beside FusionBench", ["tensors", "largest difference / largest τ", "differs"], rows)
    report.finish(path or workdir / "results" / "fusion_bench_parity.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
