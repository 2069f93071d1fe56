"""Compare settings of the quickstart on its validation examples (never on the test examples).

`python choose_options.py` prints, for each setting and stage, mean exact match and mean loss over the three skills. It
takes an hour on two cores and is not needed for the quickstart. It runs the driver's algorithm without the cluster.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from merged_models import MergedModels
from scoring import score
from skills import SKILLS

from actors.expert import Expert
from actors.trainer import Trainer, WindowSample
from engine.calibration.records import read_records
from engine.calibration.samples import make_samples
from engine.calibration.text_encoder import TextEncoder
from engine.codec import pack_all
from engine.config.reader import load_config
from engine.learning.importance import stage_2_layout
from engine.learning.learner import Learner, first_stage, second_stage
from engine.learning.targets import load_tensors
from engine.planning.open_models import open_task_vectors
from engine.planning.planner import make_plan
from engine.planning.schedule import training_order, windows
from engine.storage.paths import open_folder

CONFIG = Path(__file__).resolve().parent / "merge.yaml"
WEIGHTS = (0.4, 0.6, 0.8)
SETTINGS = [
    "hidden_weight=0.01 regularization=0 learning_rate=0.2 epochs=2 gradient_accumulation=8",
    "hidden_weight=0.01 regularization=0 learning_rate=0.1 epochs=2 gradient_accumulation=4",
    "hidden_weight=0.001 regularization=0 learning_rate=0.2 epochs=2 gradient_accumulation=4",
    "hidden_weight=0.001 regularization=0.5 learning_rate=0.2 epochs=2 gradient_accumulation=4",
    "hidden_weight=0.001 regularization=0 learning_rate=0.2 epochs=2 gradient_accumulation=4 start=stage1 fixed=stage1",
]


def main(base_settings: list[str]) -> None:
    """Score the given settings, or Task Arithmetic at several weights and the settings of this module."""
    settings = base_settings or SETTINGS
    plan = make_plan(load_config(CONFIG), CONFIG.parent)
    models = MergedModels(plan)
    samples = make_samples(read_records(plan), TextEncoder(models.tokenizer), plan)
    targets, expert = {}, Expert(plan, 0)
    with tempfile.TemporaryDirectory() as folder:
        for sample in (sample for mine in samples for sample in mine):
            key = sample.expert, sample.index
            expert.target(sample, open_folder(folder), str(key))
            targets[key] = pack_all(load_tensors(open_folder(folder), [str(key)]))
    inspected = open_task_vectors(plan, torch.get_num_threads()).inspect(plan.merged)
    magnitudes = np.stack([inspected[name].magnitudes for name in plan.merged], axis=1)

    def show(what: str, coefficients) -> None:
        scores = {skill: score(models.set(coefficients), models.tokenizer, skill, "validation") for skill in SKILLS}
        mean = (
            sum(s.exact_match for s in scores.values()) / len(scores),
            sum(s.loss for s in scores.values()) / len(scores),
        )
        print(
            f"{what}: {mean[0]:.1f} % loss {mean[1]:.3f}  ",
            {k: f"{s.exact_match:.0f}" for k, s in scores.items()},
            flush=True,
        )

    def learn(plan, stage):
        parameters, state = plan.config.parameters, None
        trainer = Trainer(plan, models.shards, lambda target: target)
        order = training_order([len(mine) for mine in samples], parameters.epochs)
        for number, window in enumerate(windows(order, parameters.gradient_accumulation)):
            step = trainer.step(stage, state, number, [WindowSample(samples[k][i], targets[k, i]) for k, i in window])
            state = step.state
        kl, hidden = (sum(row[part] for row in step.rows) / len(step.rows) for part in ("kl", "hidden"))
        print(f"    last window: kl {kl:.3f} hidden {hidden:.2f}")
        learner = Learner(parameters, stage)
        learner.restore(state)
        return learner.coefficients

    if not base_settings:
        for weight in WEIGHTS:
            show(f"task arithmetic {weight}", models.constant([weight] * len(plan.experts)))
    for setting in settings:
        plan = make_plan(load_config(CONFIG, [f"parameters.{one}" for one in setting.split()]), CONFIG.parent)
        first = learn(plan, first_stage(plan))
        show(f"stage 1 {setting}", first)
        layout, _ = stage_2_layout(first, magnitudes, plan.config.parameters.budget, plan.config.parameters.kappa)
        show(f"stage 2 {setting}", learn(plan, second_stage(plan, layout, first)))


if __name__ == "__main__":
    main(sys.argv[1:])
