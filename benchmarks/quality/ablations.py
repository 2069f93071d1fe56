"""Score variations of Expert Merging on bench A's validation split: those of its options, and those of its samples.

`python benchmarks/quality/ablations.py [NAME ...]` appends a line to `results/ablations.jsonl` for each variation, seed
and stage not there yet. Variations of options are in OPTIONS. The others change which texts are compared:

- `on-policy`: after stage 1, the merged model writes a response to each prompt, the experts score it, and stage 2
  learns on these texts and the experts' own, on as many passes in all.
- `on-policy alone`: stage 2 learns on the merged model's texts alone.
- `sampled`: as on-policy, but the experts write the second text, sampled at temperature 1.
- `validation`: a quarter of the samples is held out, and each stage ends after the epoch with their smallest loss.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench import Bench, Lesson
from choose import RESULTS, Log, score_into
from fine_tune import WORKDIR

from engine.calibration.samples import Sample
from engine.learning.importance import stage_2_layout
from engine.learning.learner import Learner, Stage, first_stage, second_stage
from engine.planning.schedule import training_order, windows
from engine.task_vectors.coefficients import Coefficients

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "chunks: spectral": {"chunks": "spectral"},
    "chunks: direction": {"chunks": "direction"},
    "hidden_layers: all": {"hidden_layers": "all"},
    "hidden_layers: 10, 20, 30": {"hidden_layers": [10, 20, 30]},
    "no hidden loss": {"hidden_weight": 0.0},
    "regularization: 0.3": {"regularization": 0.3},
    "norms too": {"exclude": [".*lm_head.*", ".*embed_tokens.*"]},
    "samples: 2": {"samples_per_model": 2},
    "samples: 5": {"samples_per_model": 5},
    "samples: 20": {"samples_per_model": 20},
}
TEXTS = ("on-policy", "on-policy alone", "sampled", "validation")
NEW_TOKENS = 64


class Variation(Lesson):
    """A lesson that may go on with other samples than it began with."""

    def write(self, own: bool) -> list[list[Sample]]:
        """Return the samples with responses by the bench's present weights, or sampled from the expert (`own`)."""
        written: list[list[Sample]] = []
        for mine in self.samples:
            if own:
                self.bench.load(self.plan.experts[mine[0].expert].name)
            torch.manual_seed(self.plan.config.seed)
            written.append([self._answered(sample, own, len(mine)) for sample in mine])
        return written

    def _answered(self, sample: Sample, own: bool, shift: int) -> Sample:
        ids_BT = torch.tensor([sample.input_ids])
        with torch.inference_mode():
            choice = {"do_sample": True, "temperature": 1.0, "top_k": 0} if own else {"do_sample": False}
            out_BT = self.bench.model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=NEW_TOKENS, **choice
            )
        return replace(sample, index=sample.index + shift, input_ids=tuple(out_BT[0].tolist()), generate=0)

    def learn(self, stage: Stage, samples: Sequence[Sequence[Sample]], epochs: int) -> Coefficients:
        """Run a stage on these samples of every expert."""
        for sample in (sample for mine in samples for sample in mine):
            self.keep(sample)
        parameters, learner = self.plan.config.parameters, Learner(self.plan.config.parameters, stage)
        order = training_order([len(mine) for mine in samples], epochs)
        for number, window in enumerate(windows(order, parameters.gradient_accumulation)):
            places = [self.placed(samples[k][i]) for k, i in window]
            learner.restore(self.trainer.step(stage, learner.state(), number, places).state)
        return learner.coefficients

    def best_epoch(self, stage: Stage, held: Sequence[Sample], rest: Sequence[Sequence[Sample]]) -> Coefficients:
        """Run a stage on `rest` and return the coefficients after the epoch with the least loss on `held`."""
        parameters, learner = self.plan.config.parameters, Learner(self.plan.config.parameters, stage)
        epoch = training_order([len(mine) for mine in rest], 1)
        found: list[tuple[float, Coefficients]] = []
        number = 0
        for _ in range(parameters.epochs):
            for window in windows(epoch, parameters.gradient_accumulation):
                places = [self.placed(rest[k][i]) for k, i in window]
                learner.restore(self.trainer.step(stage, learner.state(), number, places).state)
                number += 1
            losses = self.trainer.measure(learner.coefficients, [self.placed(sample) for sample in held])
            found.append((float(np.mean([one.kl + one.hidden for one in losses])), learner.coefficients))
        print("loss on the samples held out, by epoch:", [round(loss, 4) for loss, _ in found], flush=True)
        return min(found, key=lambda pair: pair[0])[1]


def vary(bench: Bench, name: str, seed: int) -> tuple[Any, list[Coefficients]]:
    """Return the plan and the coefficients after both stages of a variation of TEXTS."""
    plan, (first, *_), _ = bench.learn(bench.plan("expert_merging_pp", {}, seed))
    lesson, parameters = Variation(bench, plan), plan.config.parameters
    held = [sample for mine in lesson.samples for sample in mine[len(mine) * 3 // 4 :]]
    rest = [mine[: len(mine) * 3 // 4] for mine in lesson.samples]
    if name == "validation":
        first = lesson.best_epoch(first_stage(plan), held, rest)
    layout, _ = stage_2_layout(first, bench.magnitudes(plan), parameters.budget, parameters.kappa)
    stage = second_stage(plan, layout, first)
    if name == "validation":
        return plan, [first, lesson.best_epoch(stage, held, rest)]
    bench.merge(plan, first)
    written = lesson.write(own=name == "sampled")
    if name == "on-policy alone":
        return plan, [first, lesson.learn(stage, written, parameters.epochs)]
    both = [[*mine, *more] for mine, more in zip(lesson.samples, written, strict=True)]
    return plan, [first, lesson.learn(stage, both, parameters.epochs // 2)]


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seed", "seeds", multiple=True, type=int, default=range(3))
@click.option("--adapters", default="")
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(os.environ.get("QUALITY_WORKDIR", WORKDIR)))
def main(names: tuple[str, ...], seeds: tuple[int, ...], adapters: str, workdir: Path) -> None:
    bench, log = Bench(workdir, adapters=adapters), Log(RESULTS / "ablations.jsonl")
    for name in names or (*OPTIONS, *TEXTS):
        for seed in seeds:
            keys = [{"variation": name, "stage": number, "seed": seed} | bench.which for number in (1, 2)]
            if all(log.has(**key) for key in keys):
                continue
            if name in OPTIONS:
                options = OPTIONS[name]
                samples = int(options.get("samples_per_model", 8))
                plan, stages, _ = bench.learn(bench.plan("expert_merging_pp", options, seed, samples))
            else:
                plan, stages = vary(bench, name, seed)
            for key, coefficients in zip(keys, stages, strict=True):
                if not log.has(**key):
                    bench.merge(plan, coefficients)
                    score_into(log, bench, "validation", key)


if __name__ == "__main__":
    main()
