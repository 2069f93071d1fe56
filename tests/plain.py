"""The driver's algorithm with the actors as plain classes in one process, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from actors.expert import Expert
from actors.trainer import Trainer, WindowSample
from engine.calibration import read_records, tokenize, training_order, windows
from engine.checkpoint import open_base, open_expert
from engine.coefficients import Coefficients
from engine.importance import stage_2_layout
from engine.model import load_tokenizer
from engine.plan import Plan
from engine.task_vectors import LocalShards, TaskVectors
from engine.training import Learner, Stage, first_stage, second_stage


def task_vectors(plan: Plan, threads: int = 1) -> TaskVectors:
    experts = [(expert.name, open_expert(expert)) for expert in plan.experts]
    return TaskVectors(open_base(plan), experts, getattr(torch, plan.dtype), threads)


class Plain:
    def __init__(self, plan: Plan, scratch: Path) -> None:
        self.plan, streams = plan, task_vectors(plan)
        self.samples = tokenize(read_records(plan), load_tokenizer(open_base(plan).folder), plan)
        self.targets = {}
        for k, mine in enumerate(self.samples):
            expert = Expert(plan, k)
            for sample in mine:
                _, self.targets[k, sample.index] = expert.target(sample, scratch / f"{k}-{sample.index}.safetensors")
        inspected = streams.inspect(plan.merged)
        self.magnitudes = np.stack([inspected[name].magnitudes for name in plan.merged], axis=1)
        self.trainer = Trainer(plan, LocalShards(streams), lambda target: target)
        self.rows: list[dict[str, object]] = []

    def learn(self, stage: Stage) -> Coefficients:
        parameters = self.plan.config.parameters
        order = training_order([len(mine) for mine in self.samples], parameters.epochs)
        state = None
        for number, window in enumerate(windows(order, parameters.gradient_accumulation)):
            samples = [WindowSample(k, i, self.targets[k, i]) for k, i in window]
            step = self.trainer.step(stage, state, number, samples)
            state, self.rows = step.state, [*self.rows, *step.rows]
        learner = Learner(parameters, stage)
        assert state is not None
        learner.restore(state)
        return learner.coefficients

    def run(self) -> list[Coefficients]:
        options = self.plan.config.parameters
        first = self.learn(first_stage(self.plan))
        layout, self.importance = stage_2_layout(first, self.magnitudes, options.budget, options.kappa)
        return [first, self.learn(second_stage(self.plan, layout, first))]
