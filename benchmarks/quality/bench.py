"""Merge, learn and score in one process, without Ray; the basis of the quality benchmark's comparisons.

The work is done by the engine's code (trainer and expert as plain classes, the jobs of the weight-space methods). The
bench holds one loaded model, whose weights are replaced by those to score.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
import yaml
from safetensors import safe_open
from scoring import score_rows
from skills import encode
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from actors.expert import Expert
from actors.shard import Shard
from actors.trainer import Trainer, WindowSample
from engine.calibration.encoder import encoder
from engine.calibration.records import read_records
from engine.calibration.samples import Sample, make_samples
from engine.checkpoints.writer import torch_dtype
from engine.codec import pack_all
from engine.config.reader import load_config
from engine.config.schema import Config
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
from engine.methods.learned import SECOND_STAGE
from engine.output.model_folder import output_files
from engine.planning.factors import directions
from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.planning.schedule import training_order, windows
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.shards.prepasses import known_of
from engine.shards.weight_space import WeightSpace
from engine.storage.folder import Folder
from engine.storage.paths import open_folder
from engine.task_vectors.coefficients import Coefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import stream

logging.disable_progress_bar()
POOL = tasks.SIZES["calibration"]


@dataclass(frozen=True)
class Score:
    """By skill: exact match in per cent of the items, and loss of the answers in nats per token."""

    exact_match: dict[str, float]
    loss: dict[str, float]


class Bench:
    """A model that takes the weights of base, experts, mixture or any merge.

    `workdir/models` holds base, experts and mixture; calibration files, targets and states are kept next to it.

    Args:
        workdir: The folder of all of these.
        skills: The skills whose experts are merged. Default: all of bench A.
        adapters: Which experts: full ones (empty), or LoRA adapters, by the end of their names (`-r8`, `-r16`).
    """

    def __init__(self, workdir: Path, skills: Sequence[str] = tuple(tasks.BENCHES["a"]), adapters: str = "") -> None:
        self.workdir, self.skills, self.adapters = workdir, tuple(skills), adapters
        self.models = workdir / "models"
        base = self.models / "base"
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()  # transformers may have memory-mapped the file
        self._magnitudes: dict[Any, Any] = {}
        self._rows = {
            (skill, split): sorted((encode(self.tokenizer, *one) for one in examples), key=lambda row: len(row[0]))
            for skill in self.skills
            for split, examples in tasks.splits(skill).items()
            if split != "calibration"
        }

    @property
    def which(self) -> dict[str, Any]:
        """What a key of the results says of the merged experts; only the training for the full experts of bench A."""
        which = {"training": self.training} | ({} if self.skills[0] in tasks.BENCHES["a"] else {"bench": "b"})
        if self.skills != tuple(tasks.BENCHES["a"]):
            which["experts"] = len(self.skills)
        return which | ({"adapters": self.adapters} if self.adapters else {})

    @cached_property
    def training(self) -> str:
        """What tells these experts from those of another training, which has other bits on another kind of CPU."""
        folder = self.models / (self.skills[0] + self.adapters)
        found = hashlib.sha256()
        with open(folder / ("adapter_model.safetensors" if self.adapters else "model.safetensors"), "rb") as file:
            # Enough to see a difference: the header, and some weights.
            found.update(file.read(1 << 24))
        return found.hexdigest()[:8]

    # Weights and scores.

    def load(self, name: str) -> None:
        """Load the weights of the base, an expert (an adapter is added to the base), the mixture, or any folder."""
        if (self.models / name / "adapter_config.json").exists():
            self.combine(self.plan("task_arithmetic", {"weight": 1.0}, experts=[name]))
            return
        with safe_open(self.models / name / "model.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                self.model.get_parameter(key).data.copy_(file.get_tensor(key))

    def merge(self, plan: Plan, coefficients: Coefficients) -> None:
        """Set the model to the base plus the task vectors with these coefficients."""
        self.load("base")
        shards = LocalShards(plan, torch.get_num_threads(), overlap=False, state=self.state(plan))
        for arriving in shards.merge(coefficients, self).values():
            for arrival in arriving:
                arrival.result()

    def buffer(self, piece: Piece) -> torch.Tensor:
        """Return the part of the model's memory that a merged piece is written to; see `PieceSink`."""
        return self.model.get_parameter(piece.name).data.view(-1)[piece.start : piece.stop]

    def put(self, piece: Piece, merged_N: torch.Tensor) -> None:
        """Do nothing: the piece has been written to the model's memory."""

    def combine(self, plan: Plan) -> None:
        """Set the model to the merge of a weight-space method."""
        streams = open_task_vectors(plan, torch.get_num_threads())
        space, shard = WeightSpace(plan, streams), Shard(plan, 0)
        known = known_of(plan, lambda *asked: [shard.measure(*asked)])
        entries = [entry for file in output_files(plan) for entry in file.tensors]
        jobs = [space.job(entry, torch_dtype("F32"), known, None) for entry in entries]
        places = (piece for entry in entries for piece in pieces(entry.name, entry.shape))
        with torch.inference_mode():
            for piece, merged_N in zip(places, stream(jobs, streams.pool, streams.threads), strict=True):
                self.buffer(piece).copy_(merged_N)

    def score(self, split: str, skills: Sequence[str] = ()) -> Score:
        """Return exact match and loss of the model on a split, with forward passes in bfloat16 autocast."""
        with torch.autocast("cpu", torch.bfloat16):
            scores = {skill: score_rows(self.model, self._rows[skill, split]) for skill in skills or self.skills}
        return Score({s: one.exact_match for s, one in scores.items()}, {s: one.loss for s, one in scores.items()})

    # Plans and their inputs.

    def plan(
        self,
        merge_method: str,
        options: Mapping[str, Any],
        seed: int = 0,
        samples: int = 8,
        experts: Sequence[str] | None = None,
    ) -> Plan:
        """Return a plan of the skills' experts, or of these; `options` are dotted keys of the config, or parameters."""
        config = self.config(merge_method, options, seed, samples, experts)
        return make_plan(load_config(*config), self.workdir / "configs")

    def config(
        self,
        merge_method: str,
        options: Mapping[str, Any],
        seed: int = 0,
        samples: int = 8,
        experts: Sequence[str] | None = None,
    ) -> tuple[Path, list[str]]:
        """Write the config of a plan, and return its path and the overrides with the options."""
        names = [skill + self.adapters for skill in self.skills] if experts is None else experts
        folder = self.workdir / "configs"
        folder.mkdir(exist_ok=True)
        raw: dict[str, Any] = {"merge_method": merge_method, "base_model": str(self.models / "base")}
        raw["models"] = [
            {"model": str(self.models / name), "calibration": str(self._calibration(name, seed, samples))}
            for name in names
        ]
        raw["parameters"] = {"samples_per_model": samples}
        raw["seed"] = seed
        path = folder / f"{merge_method}.yaml"
        path.write_text(yaml.safe_dump(raw))
        nested = [
            f"{key if key.partition('.')[0] in Config.model_fields else f'parameters.{key}'}={json.dumps(value)}"
            for key, value in options.items()
        ]
        return path, nested

    def _calibration(self, expert: str, seed: int, samples: int) -> Path:
        """Write `samples` prompts of an expert's skill, drawn by the seed; a larger sample extends a smaller one."""
        skill = expert.partition("-")[0]
        path = self.workdir / "calibration" / f"{skill}-{seed}-{samples}.jsonl"
        path.parent.mkdir(exist_ok=True)
        chosen = random.Random(f"{skill}-{seed}").sample(range(POOL), POOL)[:samples]
        pool = tasks.splits(skill)["calibration"]
        path.write_text("".join(json.dumps({"question": pool[i][0]}) + "\n" for i in chosen))
        return path

    def state(self, plan: Plan) -> Folder:
        """Return the folder of the plan's stored task vectors, if any, computed once per kind and set of experts."""
        what = [plan.config.parameters.task_vectors, *(expert.name for expert in plan.experts)]
        folder = open_folder(str(self.workdir / f"state-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"))
        orthogonalise(plan, open_task_vectors(plan, torch.get_num_threads()), folder, plan.orthogonal)
        return folder

    # Learning.

    def learn(self, plan: Plan) -> tuple[Plan, list[Coefficients], list[dict[str, Any]]]:
        """Run the stages of a plan as the driver does, without the cluster.

        The result of each stage is stored and reused; that of stage 1 does not depend on the options of stage 2.

        Returns:
            The plan with its priors, the coefficients after each stage, and the rows of metrics.
        """
        lesson, config = Lesson(self, plan), plan.config

        def one() -> Any:
            lesson.find_prior()
            first = lesson.stage(first_stage(lesson.plan))
            return lesson.plan.priors, first, lesson.rows

        priors, first, rows = self._stored(plan, {"merge_method": True, "parameters": set(SECOND_STAGE)}, one)
        experts = (replace(expert, weight=prior) for expert, prior in zip(plan.experts, priors, strict=True))
        plan = lesson.plan = replace(plan, experts=tuple(experts))
        if config.stages == 1:
            return plan, [first], rows

        def two() -> Any:
            parameters, lesson.rows = config.parameters, list(rows)
            layout, _ = stage_2_layout(
                first,
                self.magnitudes(plan),
                parameters.budget,
                parameters.kappa,
                directions(plan),
                parameters.chunks == "direction",
            )
            return lesson.stage(second_stage(plan, layout, first)), lesson.rows

        second, rows = self._stored(plan, {}, two)
        return plan, [first, second], rows

    def _stored(self, plan: Plan, without: Any, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns, stored by the options of the plan's config but for those `without`."""
        options = plan.config.model_dump(exclude=without, mode="json")
        key = json.dumps([plan.config.has_targets, options], sort_keys=True)
        path = self.workdir / "stages" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pickle"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps(compute()))
        return pickle.loads(path.read_bytes())

    def magnitudes(self, plan: Plan) -> Any:
        """Return the mean magnitudes sₖ,ₗ of the task vectors [K, L]."""
        key = *(expert.name for expert in plan.experts), plan.merged, plan.config.parameters.task_vectors
        if key not in self._magnitudes:
            streams = open_task_vectors(plan, torch.get_num_threads())
            inspected = with_orthogonal(plan, streams, self.state(plan)).inspect(plan.merged)
            self._magnitudes[key] = np.stack([inspected[name].magnitudes for name in plan.merged], axis=1)
        return self._magnitudes[key]


class Lesson:
    """The samples, targets and trainer of one plan."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.bench, self.plan, self.rows = bench, plan, []
        self._expert = Expert(plan, 0)
        records = read_records(plan)
        self.samples = make_samples(records, encoder(plan, records), plan)
        self._targets: dict[tuple[int, int], Any] = {}
        for sample in (sample for mine in self.samples for sample in mine):
            self.keep(sample)
        shards = LocalShards(plan, torch.get_num_threads(), overlap=False, state=bench.state(plan))
        self.trainer = Trainer(plan, shards, lambda target: target)

    def keep(self, sample: Sample) -> None:
        """Have the target of a sample computed, so that steps can use it."""
        self._targets[sample.expert, sample.index] = self._target(self.bench.workdir, sample)

    def placed(self, sample: Sample) -> WindowSample:
        """Return a sample with its target, as the trainer takes it."""
        return WindowSample(sample, self._targets[sample.expert, sample.index])

    def find_prior(self) -> None:
        """Replace the plan's `weight: auto` by the prior of least loss over all samples."""
        if needs_prior(self.plan):
            window = [self.placed(sample) for mine in self.samples for sample in mine]
            each = [self.trainer.measure(common_prior(self.plan, weight), window) for weight in PRIORS]
            losses_WN2 = np.array([[(one.kl, one.hidden) for one in losses] for losses in each])
            weight_N = np.array([item.sample.loss_weight for item in window])
            prior = best_prior(losses_WN2, weight_N, self.plan.config.parameters.hidden_weight)
            self.plan = with_prior(self.plan, prior)

    def stage(self, stage: Stage) -> Coefficients:
        """Run all optimiser steps of a stage and return its coefficients."""
        parameters, learner = self.plan.config.parameters, Learner(self.plan.config.parameters, stage)
        order = training_order([len(mine) for mine in self.samples], parameters.epochs)
        for number, window in enumerate(windows(order, parameters.gradient_accumulation)):
            places = [self.placed(self.samples[k][i]) for k, i in window]
            step = self.trainer.step(stage, learner.state(), number, places)
            learner.restore(step.state)
            self.rows.extend(step.rows)
        return learner.coefficients

    def _target(self, workdir: Path, sample: Any) -> Any:
        """Return a sample's target, computed by its expert once and then read from the disk."""
        plan, folder = self.plan, workdir / "targets"
        if not plan.config.has_targets:
            return pack_all(without_targets(sample).tensors())
        folder.mkdir(exist_ok=True)
        head = any("embed" in name for name in plan.merged)
        key = f"{sample.input_ids} {sample.generate} {sample.masked_spans} {plan.hidden_layers} {head} {plan.dtype}"
        name = f"{plan.experts[sample.expert].name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not (folder / name).exists():
            self._expert.target(sample, open_folder(str(folder)), name)
        return pack_all(load_tensors(open_folder(str(folder)), [name]))
