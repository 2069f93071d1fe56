"""One process that merges, learns and scores: what the quality benchmark's comparisons are made of.

The engine's own code does the work (trainer and expert as plain classes, the weight-space methods' own jobs); this has
one loaded model that is set to whatever is to be scored. Knows no Ray, and nothing of which options are good.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
import yaml
from safetensors import safe_open
from scoring import score_rows
from train_experts import encode
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from actors.expert import Expert
from actors.shard import Shard
from actors.trainer import Trainer, WindowSample
from engine.calibration.encoder import encoder
from engine.calibration.records import read_records
from engine.calibration.samples import make_samples
from engine.checkpoints.writer import torch_dtype
from engine.codec import pack_all
from engine.config.reader import load_config
from engine.config.schema import Config
from engine.learning.importance import stage_2_layout
from engine.learning.learner import (
    PRIORS,
    Learner,
    Stage,
    common_prior,
    first_stage,
    needs_prior,
    second_stage,
    with_prior,
)
from engine.learning.targets import without_targets
from engine.methods.learned import SECOND_STAGE
from engine.output.model_folder import output_files
from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.planning.schedule import training_order, windows
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.shards.weight_space import WeightSpace, model_thresholds
from engine.storage.folder import Folder
from engine.storage.paths import open_folder
from engine.task_vectors.coefficients import Coefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import stream

logging.disable_progress_bar()
POOL = tasks.SIZES["calibration"]


@dataclass(frozen=True)
class Score:
    """By skill: exact match in per cent of the items, and loss in nats a token of the answers."""

    exact_match: dict[str, float]
    loss: dict[str, float]


class Bench:
    """`workdir/models` holds base, experts and mixture; calibration files and targets are kept beside them."""

    def __init__(self, workdir: Path, skills: Sequence[str] = tuple(tasks.SKILLS)) -> None:
        self.workdir, self.skills = workdir, tuple(skills)
        self.models = workdir / "models"
        base = self.models / "base"
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()  # what transformers loaded may be the file's own memory
        self._magnitudes: dict[Any, Any] = {}
        self._rows = {
            (skill, split): sorted((encode(self.tokenizer, *one) for one in examples), key=lambda row: len(row[0]))
            for skill in self.skills
            for split, examples in tasks.splits(skill).items()
            if split != "calibration"
        }

    # What is scored.

    def load(self, name: str) -> None:
        """The model becomes base, an expert or the mixture's."""
        with safe_open(self.models / name / "model.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                self.model.get_parameter(key).data.copy_(file.get_tensor(key))

    def merge(self, plan: Plan, coefficients: Coefficients) -> None:
        """The model becomes the base with task vectors by these coefficients."""
        self.load("base")
        shards = LocalShards(plan, torch.get_num_threads(), overlap=False, state=self.state(plan))
        for arriving in shards.merge(coefficients, self).values():
            for arrival in arriving:
                arrival.result()

    def buffer(self, piece: Piece) -> torch.Tensor:
        """See `engine.shards.protocol.Model`."""
        return self.model.get_parameter(piece.name).data.view(-1)[piece.start : piece.stop]

    def put(self, piece: Piece, merged_N: torch.Tensor) -> None:
        """It was written to the model's own memory."""

    def combine(self, plan: Plan) -> None:
        """The model becomes the merge of a method that learns nothing."""
        streams = open_task_vectors(plan, torch.get_num_threads())
        space, shard = WeightSpace(plan, streams), Shard(plan, 0)
        thresholds = model_thresholds(plan, lambda high: shard.count(list(plan.merged), high))
        entries = [entry for file in output_files(plan) for entry in file.tensors]
        jobs = [space.job(entry, torch_dtype("F32"), thresholds, None) for entry in entries]
        places = (piece for entry in entries for piece in pieces(entry.name, entry.shape))
        with torch.inference_mode():
            for piece, merged_N in zip(places, stream(jobs, streams.pool, streams.threads), strict=True):
                self.buffer(piece).copy_(merged_N)

    def score(self, split: str, skills: Sequence[str] = ()) -> Score:
        """Exact match and loss of the model as it stands, on a split; the forward pass in bfloat16 autocast."""
        with torch.autocast("cpu", torch.bfloat16):
            found = {skill: score_rows(self.model, self._rows[skill, split]) for skill in skills or self.skills}
        return Score({s: one.exact_match for s, one in found.items()}, {s: one.loss for s, one in found.items()})

    # What is merged.

    def plan(self, merge_method: str, options: Mapping[str, Any], seed: int = 0, samples: int = 8) -> Plan:
        """A plan of the skills' experts. `options`: keys of the config by their dotted names, or parameters."""
        folder = self.workdir / "configs"
        folder.mkdir(exist_ok=True)
        raw: dict[str, Any] = {"merge_method": merge_method, "base_model": str(self.models / "base")}
        raw["models"] = [
            {"model": str(self.models / skill), "calibration": str(self._calibration(skill, seed, samples))}
            for skill in self.skills
        ]
        raw["parameters"] = {"samples_per_model": samples}
        raw["seed"] = seed
        path = folder / f"{merge_method}.yaml"
        path.write_text(yaml.safe_dump(raw))
        nested = [
            f"{key if key.partition('.')[0] in Config.model_fields else f'parameters.{key}'}={json.dumps(value)}"
            for key, value in options.items()
        ]
        return make_plan(load_config(path, nested), folder)

    def _calibration(self, skill: str, seed: int, samples: int) -> Path:
        """`samples` prompts of the skill's pool, as the seed has them; more of them begin with the fewer."""
        path = self.workdir / "calibration" / f"{skill}-{seed}-{samples}.jsonl"
        path.parent.mkdir(exist_ok=True)
        chosen = random.Random(f"{skill}-{seed}").sample(range(POOL), POOL)[:samples]
        pool = tasks.splits(skill)["calibration"]
        path.write_text("".join(json.dumps({"question": pool[i][0]}) + "\n" for i in chosen))
        return path

    def state(self, plan: Plan) -> Folder:
        """Where the plan's orthogonal task vectors are, if it has any; made once for every set of experts."""
        folder = open_folder(str(self.workdir / f"state-{len(plan.experts)}"))
        orthogonalise(plan, open_task_vectors(plan, torch.get_num_threads()), folder, plan.orthogonal)
        return folder

    # What is learned.

    def learn(self, plan: Plan) -> tuple[Plan, list[Coefficients], list[dict[str, Any]]]:
        """The plan with its priors, coefficients after each stage, and rows of metrics: the driver without the cluster.

        Stage 1 does not know of stage 2, so what it learned is kept for other options of that.
        """
        lesson = Lesson(self, plan)
        options = plan.config.model_dump(exclude={"merge_method": True, "parameters": set(SECOND_STAGE)}, mode="json")
        said = json.dumps([plan.config.has_targets, options], sort_keys=True)
        path = self.workdir / "stages" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.pickle"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            lesson.find_prior()
            first = lesson.stage(first_stage(lesson.plan))
            path.write_bytes(pickle.dumps((lesson.plan.priors, first, lesson.rows)))
        priors, first, rows = pickle.loads(path.read_bytes())
        experts = (replace(expert, weight=prior) for expert, prior in zip(plan.experts, priors, strict=True))
        plan = lesson.plan = replace(plan, experts=tuple(experts))
        if plan.config.stages == 1:
            return plan, [first], rows
        parameters, lesson.rows = plan.config.parameters, list(rows)
        layout, _ = stage_2_layout(first, self.magnitudes(plan), parameters.budget, parameters.kappa)
        return plan, [first, lesson.stage(second_stage(plan, layout, first))], lesson.rows

    def magnitudes(self, plan: Plan) -> Any:
        """sₖ,ₗ [K, L]."""
        key = len(plan.experts), plan.merged, plan.config.parameters.task_vectors
        if key not in self._magnitudes:
            streams = open_task_vectors(plan, torch.get_num_threads())
            inspected = with_orthogonal(plan, streams, self.state(plan)).inspect(plan.merged)
            self._magnitudes[key] = np.stack([inspected[name].magnitudes for name in plan.merged], axis=1)
        return self._magnitudes[key]


class Lesson:
    """Samples, targets and a trainer of one plan."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.plan, self.rows = plan, []
        self._expert, self._shard = Expert(plan, 0), Shard(plan, 0)
        records = read_records(plan)
        self.samples = make_samples(records, encoder(plan, records), plan)
        self._targets = {(s.expert, s.index): self._target(bench.workdir, s) for mine in self.samples for s in mine}
        shards = LocalShards(plan, torch.get_num_threads(), overlap=False, state=bench.state(plan))
        self._trainer = Trainer(plan, shards, lambda target: target)

    def find_prior(self) -> None:
        if needs_prior(self.plan):
            asked = self._window([(s.expert, s.index) for mine in self.samples for s in mine])
            losses = [self._trainer.measure(common_prior(self.plan, weight), asked) for weight in PRIORS]
            self.plan = with_prior(self.plan, PRIORS[int(np.argmin(losses))])

    def stage(self, stage: Stage) -> Coefficients:
        parameters, learner = self.plan.config.parameters, Learner(self.plan.config.parameters, stage)
        order = training_order([len(mine) for mine in self.samples], parameters.epochs)
        for number, window in enumerate(windows(order, parameters.gradient_accumulation)):
            step = self._trainer.step(stage, learner.state(), number, self._window(window))
            learner.restore(step.state)
            self.rows.extend(step.rows)
        return learner.coefficients

    def _window(self, places: Sequence[tuple[int, int]]) -> list[WindowSample]:
        return [WindowSample(self.samples[k][i], self._targets[k, i]) for k, i in places]

    def _target(self, workdir: Path, sample: Any) -> Any:
        """A sample's target; what an expert said to a prompt is kept for the next time that it is asked."""
        plan, folder = self.plan, workdir / "targets"
        if not plan.config.has_targets:
            return pack_all(without_targets(sample).tensors())
        folder.mkdir(exist_ok=True)
        head = any("embed" in name for name in plan.merged)
        said = f"{sample.input_ids} {sample.generate} {sample.masked_spans} {plan.hidden_layers} {head} {plan.dtype}"
        name = f"{plan.experts[sample.expert].name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
        if not (folder / name).exists():
            self._expert.target(sample, open_folder(str(folder)), name)
        return self._shard.target(open_folder(str(folder)), name)
