"""The driver's algorithm in one process without Ray, with the actors as plain objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.expert import Expert
from actors.trainer import Trainer, WindowSample
from engine.codec import pack_all
from engine.config.resources import Use
from engine.learning.importance import stage_2_layout
from engine.learning.learner import (
    PRIORS,
    Learner,
    Stage,
    best_prior,
    common_prior,
    first_stage,
    needs_prior,
    second_stage,
    with_prior,
)
from engine.learning.targets import load_tensors, without_targets
from engine.planning.factors import decomposed, directions, factored
from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan
from engine.planning.schedule import training_order, windows
from engine.run.preparation import check_inputs, prepare
from engine.run.run_folder import RunFolder
from engine.shards.factor_shards import FactorShards
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.shards.protocol import Arrivals, Shards
from engine.task_vectors.coefficients import Coefficients
from engine.task_vectors.pieces import Piece
from engine.task_vectors.streams import TaskVectors


def task_vectors(plan: Plan, threads: int = 1) -> TaskVectors:
    return open_task_vectors(plan, threads)


class Received:
    """A `PieceSink` without a model: flattened tensors, NaN until their pieces arrive."""

    def __init__(self, plan: Plan) -> None:
        dtype = getattr(torch, plan.dtype)
        self.tensors = {name: torch.full((numel,), torch.nan, dtype=dtype) for name, numel in plan.numels.items()}
        self.shapes = {name: plan.base_header.tensors[name].shape for name in plan.merged}
        self.pieces: list[Piece] = []

    def buffer(self, piece: Piece) -> Tensor:
        return torch.empty(piece.numel, dtype=self.tensors[piece.name].dtype)

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        self.tensors[piece.name][piece.start : piece.stop] = merged_N
        self.pieces.append(piece)

    def whole(self, name: str) -> Tensor:
        return self.tensors[name].view(self.shapes[name])

    def all_of(self, arrivals: Arrivals) -> dict[str, Tensor]:
        for futures in arrivals.values():
            for future in futures:
                future.result(30)
        return self.tensors


class Plain:
    """The algorithm; matrices are merged through factors as `factors` says, as on a CPU (`cluster.factors`)."""

    def __init__(self, plan: Plan, scratch: Path, factors: Use = "auto") -> None:
        self.plan, streams = plan, task_vectors(plan)
        run = RunFolder(str(scratch / "plain"))
        plan, records = check_inputs(plan)
        self.samples, self.targets = prepare(plan, records, run), {}
        for k, mine in enumerate(self.samples):
            expert = Expert(plan, k)
            for sample in mine:
                files = [run.inputs(sample)] if sample.inputs else []
                if plan.config.has_targets:
                    expert.target(sample, run.state, run.target(sample), *files)
                    files.append(run.target(sample))
                tensors = load_tensors(run.state, files) if files else without_targets(sample).tensors()
                self.targets[k, sample.index] = pack_all(tensors)
        through = factored(plan, on_gpu=False, use=factors)
        orthogonalise(plan, streams, run.state, decomposed(plan), through)
        inspected = with_orthogonal(plan, streams, run.state).inspect(plan.merged)
        self.magnitudes = np.stack([inspected[name].magnitudes for name in plan.merged], axis=1)
        others = plan.merged_set.difference(through)
        self.shards: Shards = LocalShards(plan, threads=1, overlap=False, state=run.state, names=others)
        if through:
            self.shards = FactorShards(plan, through, self.shards, run.state)
        self.start(trainers=1)

    def start(self, trainers: int) -> None:
        """Start with new trainers, as many as given, and without rows."""
        self.trainer, *self.others = (
            Trainer(self.plan, self.shards, lambda target: target, index=index) for index in range(trainers)
        )
        self.rows: list[dict[str, object]] = []

    def learn(self, stage: Stage) -> Coefficients:
        parameters = self.plan.config.parameters
        order = training_order([len(mine) for mine in self.samples], parameters.epochs)
        state = None
        for number, window in enumerate(windows(order, parameters.gradient_accumulation)):
            samples = [WindowSample(self.samples[k][i], self.targets[k, i]) for k, i in window]
            count = 1 + len(self.others)
            shares = [
                trainer.share(stage, state, samples, index, count) for index, trainer in enumerate(self.others, start=1)
            ]
            step = self.trainer.step(stage, state, number, samples, others=shares)
            state, self.rows = step.state, [*self.rows, *step.rows]
        learner = Learner(parameters, stage)
        assert state is not None
        learner.restore(state)
        return learner.coefficients

    def find_prior(self) -> list[float]:
        """Measure the loss of every common prior, set the best one in the plan, and return the losses."""
        order = training_order([len(mine) for mine in self.samples], epochs=1)
        everything = [WindowSample(self.samples[k][i], self.targets[k, i]) for k, i in order]
        measured = [self.trainer.measure(common_prior(self.plan, weight), everything) for weight in PRIORS]
        share = self.plan.config.parameters.hidden_weight
        pairs = [[(one.kl, one.hidden) for one in losses] for losses in measured]
        weights = np.array([one.sample.loss_weight for one in everything])
        self.plan = with_prior(self.plan, best_prior(np.array(pairs), weights, share))
        return [
            sum(weight * (kl + share * hidden) for weight, (kl, hidden) in zip(weights, losses, strict=True))
            for losses in pairs
        ]

    def run(self) -> list[Coefficients]:
        options = self.plan.config.parameters
        if needs_prior(self.plan):
            self.find_prior()
        first = self.learn(first_stage(self.plan))
        if self.plan.config.stages == 1:
            return [first]
        along, each = directions(self.plan), options.chunks == "direction"
        layout, self.importance = stage_2_layout(first, self.magnitudes, options.budget, options.kappa, along, each)
        return [first, self.learn(second_stage(self.plan, layout, first))]
