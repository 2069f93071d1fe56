"""Score default Expert Merging beside Task Arithmetic where experts or samples are not as they should be.

`python benchmarks/quality/robust.py [CASE ...]` merges dates, numbers and clock of bench A, scores on the validation
split, and appends a line to `results/robust.jsonl` for each case and merge not there yet; `--table` prints them. An
expert has 4 samples, half of the default. Task Arithmetic has a weight of 0.3, or the best common one by its losses on
the first two samples of each expert. The experts that are not sound are made from the others: `random` has random
weights, `noisy` is extraction with as much noise in its matrices as they have weights, `dates-again` is dates, and
`dates-opposed` is the base less what dates adds to it.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench import Bench, Lesson
from choose import RESULTS, Log, score_into
from fine_tune import WORKDIR
from transformers import AutoConfig, AutoModelForCausalLM

from engine.calibration.samples import Sample
from engine.learning.end_check import BASE, MERGED, distances, end_check, lost_lines, means, preflight
from engine.learning.learner import common_prior
from engine.planning.plan import Plan
from engine.planning.preflight import doubts
from engine.task_vectors.coefficients import Coefficients

WEIGHT, SCALES, FIRST = 0.3, (0.2, 0.4, 0.6, 0.8, 1.0), 2
MERGES = ("task_arithmetic", "at its best", "expert_merging")
SOUND = {skill: skill for skill in ("dates", "numbers", "clock")}


@dataclass(frozen=True)
class Case:
    """A case: its experts with the skill of their samples, the number of samples, the scored skills, and options."""

    experts: Mapping[str, str]
    samples: int = 4
    scored: tuple[str, ...] = tuple(SOUND)
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "as it should be": Case(SOUND),
    "2 samples": Case(SOUND, samples=2),
    "a random expert": Case(SOUND | {"random": "extraction"}),
    "samples of another skill": Case(dict.fromkeys(SOUND, "extraction")),
    "dates and its opposite": Case(SOUND | {"dates-opposed": "dates"}),
    "dates twice": Case(SOUND | {"dates-again": "dates"}),
    "one expert": Case({"dates": "dates"}, scored=("dates",)),
    "bfloat16": Case(SOUND, options={"dtype": "bfloat16"}),
    "samples of another skill for dates": Case(SOUND | {"dates": "extraction"}),
    "a noisy expert": Case(SOUND | {"noisy": "extraction"}),
    "1 sample": Case(SOUND, samples=1),
}


class Robust(Bench):
    """A bench of the experts of one case at a time, with a folder of its own below that of the other benches."""

    def __init__(self, workdir: Path) -> None:
        self.sound, models = workdir / "models", workdir / "robust" / "models"
        models.mkdir(parents=True, exist_ok=True)
        self._link("base", models)
        super().__init__(workdir / "robust", tuple(SOUND))

    def take(self, case: Case) -> None:
        """Make this the bench's case, and write its experts that do not exist yet."""
        self.case = case
        for name in case.experts:
            if name in SOUND:
                self._link(name, self.models)
            elif not (self.models / name).exists():
                self._write(name)

    def _link(self, name: str, models: Path) -> None:
        if not (models / name).exists():
            (models / name).symlink_to(self.sound / name)

    def _write(self, name: str) -> None:
        """Save an expert that is not sound."""
        torch.manual_seed(99)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.sound / "base"), dtype=torch.float32)
        if name != "random":
            base, dates, extraction = (
                AutoModelForCausalLM.from_pretrained(self.sound / one, dtype=torch.float32).state_dict()
                for one in ("base", "dates", "extraction")
            )
            model.load_state_dict(
                {
                    "dates-again": lambda: dates,
                    "dates-opposed": lambda: {key: 2 * start - dates[key] for key, start in base.items()},
                    "noisy": lambda: {key: noised(key, tensor) for key, tensor in extraction.items()},
                }[name]()
            )
        scratch = self.models / f"{name}.new"
        shutil.copytree(self.sound / "base", scratch, dirs_exist_ok=True)
        model.save_pretrained(scratch)
        scratch.rename(self.models / name)

    def of(self, method: str, seed: int, **options: Any) -> Plan:
        """Return a plan of the case's experts."""
        case = self.case
        return self.plan(method, {**case.options, **options}, seed, case.samples, list(case.experts))

    def _calibration(self, expert: str, seed: int, samples: int) -> Path:
        return super()._calibration(self.case.experts[expert], seed, samples)


def noised(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix of a block with noise of its own size added; another tensor as it is."""
    inner = tensor.ndim == 2 and ".layers." in name
    return tensor + torch.randn_like(tensor) * tensor.std() if inner else tensor


class Merges:
    """The merges of the bench's case with one seed."""

    def __init__(self, bench: Robust, seed: int) -> None:
        self.bench, self.seed = bench, seed

    def make(self, merge: str) -> dict[str, Any]:
        """Set the bench's model to a merge, and return what else to log of it."""
        if merge == "expert_merging":
            return self._learned()
        plan = self.bench.of("expert_merging", self.seed, task_vectors="whole")
        scale = WEIGHT
        if merge == "at its best":
            lesson = Lesson(self.bench, plan)
            few = [sample for mine in lesson.samples for sample in mine[:FIRST]]
            scale = min(SCALES, key=lambda one: measured(lesson, few, common_prior(plan, one))[:, 0].mean())
        self.bench.merge(plan, common_prior(plan, scale))
        return {"weight": scale}

    def _learned(self) -> dict[str, Any]:
        """Learn with the defaults; log what the checks say of each expert, and its KL divergences."""
        unlearned = self.bench.of("expert_merging", self.seed)
        plan, (coefficients, *_), _ = self.bench.learn(unlearned)
        lesson = Lesson(self.bench, plan)
        samples = [sample for mine in lesson.samples for sample in mine]
        points = {BASE: common_prior(unlearned, 0.0), MERGED: coefficients}
        losses = {point: measured(lesson, samples, values, point == BASE) for point, values in points.items()}
        names = [expert.name for expert in plan.experts]
        checked = end_check(losses, samples, names)
        kl = {point: {name: round(value, 4) for name, value in means(checked, point, "kl").items()} for point in points}
        said = [*doubts(plan), *preflight(checked), *lost_lines(distances(checked), plan)[1:]]
        self.bench.merge(plan, coefficients)
        alpha = {name: round(float(mine.mean()), 3) for name, mine in zip(names, coefficients.values, strict=True)}
        return {"said": said, "kl": kl, "prior": list(plan.priors), "mean_coefficients": alpha}


def measured(lesson: Lesson, samples: Sequence[Sample], coefficients: Coefficients, certain: bool = False) -> Any:
    """Return the losses of samples [N, 2], or [N, 4] with certainties."""
    found = lesson.trainer.measure(coefficients, [lesson.placed(sample) for sample in samples], certain)
    return np.array([(one.kl, one.hidden, *(one.certainties or ())) for one in found])


def table(log: Log) -> None:
    """Print exact match and loss of every case and merge, means over the scored skills."""
    print(f"| case | {' | '.join(MERGES)} |\n{'|---' * (len(MERGES) + 1)}|")
    for name in CASES:
        found = [
            [line for line in log.lines if {"case": name, "merge": m}.items() <= line["key"].items()] for m in MERGES
        ]
        print(f"| {name} | {' | '.join(map(_cell, found))} |")


def _cell(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    match, loss = (
        statistics.mean(statistics.mean(line[figure].values()) for line in lines) for figure in ("exact_match", "loss")
    )
    weight = f" ({lines[0]['weight']})" if "weight" in lines[0] else ""
    return f"{match:.1f}, {loss:.3f}{weight}"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,))
@click.option("--table", "only_table", is_flag=True)
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(os.environ.get("QUALITY_WORKDIR", WORKDIR)))
def main(names: tuple[str, ...], seeds: tuple[int, ...], only_table: bool, workdir: Path) -> None:
    log = Log(RESULTS / "robust.jsonl")
    if only_table:
        table(log)
        return
    bench = Robust(workdir)
    for seed in seeds:
        for name in names or CASES:
            bench.take(CASES[name])
            merges = Merges(bench, seed)
            for merge in MERGES:
                key = {"case": name, "merge": merge, "seed": seed}
                if not log.has(**key):
                    more = merges.make(merge)
                    score_into(log, bench, "validation", key, bench.case.scored, **more)


if __name__ == "__main__":
    main()
