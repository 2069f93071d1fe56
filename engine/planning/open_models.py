"""Open the models of a plan on any node: base, experts, task vectors, and paths of the weight files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import ModelHeader
from engine.checkpoints.tensors import Checkpoint, ComputedTensors
from engine.checkpoints.vocabulary import is_gathered
from engine.compiled import keep_compiled
from engine.planning.plan import ExpertPlan, Layout, ModelPlan, Plan
from engine.storage.address import Address
from engine.storage.cache import cache_folder
from engine.storage.paths import is_uri
from engine.task_vectors.experts import AdapterExpert, CheckpointWithAdapter, ExpertWeights, FullExpert, applied
from engine.task_vectors.streams import TaskVectors


@dataclass(frozen=True)
class WeightFile:
    """A weight file: the model or adapter that it belongs to, as the plan names it, and its path on this node."""

    model: str
    path: Path

    @property
    def address(self) -> str:
        """The file's path, or its URI if the model is in object storage and `path` is a cached copy."""
        if not is_uri(self.model):
            return str(self.path)
        address = Address.of(self.model)
        return str(address / str(self.path.relative_to(cache_folder() / address.local)))


def base_folder(plan: Plan) -> Path:
    """Return the folder of the base's files on this node."""
    return _folder(plan.base)


def load_base_config(plan: Plan) -> Any:
    """Return the config of the merged model: the base's, with the values of `config_source`.

    Raises:
        CheckpointError: See `load_model_config`.
    """
    # Here and not above: a merge that runs no model does without transformers, whose import takes seconds.
    from engine.models.loading import load_model_config, with_content

    config = load_model_config(base_folder(plan), plan.config.trust_remote_code)
    return config if plan.config.config_source is None else with_content(config, plan.base_header.config)


def open_base(plan: Plan) -> Checkpoint:
    """Open the base's weights on this node: with its adapter, and by `plan.layout`.

    A tensor whose rows `plan.vocabulary` decides has the model's own rows.
    """
    base = open_checkpoint(plan.base)
    if plan.layout is not None:
        # Without experts that need the base: as the base of a slice, an expert is read by itself.
        base = _open_layout(plan, plan.layout, base)
    return base


def open_checkpoint(model: ModelPlan) -> Checkpoint:
    """Open a checkpoint on this node, with its adapter merged into it, in the checkpoint's dtypes, as peft merges."""
    assert isinstance(model.header, ModelHeader)
    plain = Checkpoint(_folder(model), model.header.tensors)
    if model.adapter is None:
        return plain
    adapter = _adapter(model.adapter)

    def merged(name: str) -> Tensor:
        return applied(plain.read(name), adapter.task_vector(name))

    return ComputedTensors(plain.folder, plain.tensors, merged)


def _open_layout(plan: Plan, layout: Layout, base: Checkpoint) -> Checkpoint:
    """Return the bases of all slices as one checkpoint, by the names of the output."""
    opened = {
        k: open_expert(plan.experts[k])
        for k in sorted({origin.base for origin in layout.origins.values() if origin.base is not None})
    }

    def read(name: str) -> Tensor:
        origin = layout.origins.get(name)
        if origin is None or origin.base is None:
            return base.read(origin.base_name if origin is not None else name)
        expert, shape = opened[origin.base], layout.header.tensors[name].shape
        assert isinstance(expert, FullExpert | CheckpointWithAdapter)
        own = expert.whole(name)
        if plan.vocabulary is not None and is_gathered(layout.header, name):
            return own.view(-1, *shape[1:])
        numel = math.prod(shape)
        if len(own) < numel:
            own = torch.cat([own, base.read(origin.base_name).reshape(-1)[len(own) :].to(own.dtype)])
        return own[:numel].view(shape)

    return ComputedTensors(base.folder, layout.header.tensors, read)


def open_expert(expert: ExpertPlan, base: Checkpoint | None = None) -> ExpertWeights:
    """Open an expert's weights on this node.

    Args:
        expert: The expert's plan.
        base: The base's weights, needed if the expert's tensors may have other shapes.
    """
    if isinstance(expert.header, AdapterHeader):
        return _adapter(expert)
    full = FullExpert(Checkpoint(_folder(expert), expert.header.tensors), base, expert.match)
    return full if expert.adapter is None else CheckpointWithAdapter(full, _adapter(expert.adapter))


def _adapter(model: ModelPlan) -> AdapterExpert:
    header = model.header
    assert isinstance(header, AdapterHeader)
    return AdapterExpert(Checkpoint(_folder(model), header.tensors), header.pairs, header.whole)


def weight_files(model: ModelPlan) -> list[WeightFile]:
    """Return the weight files of a model: those of its checkpoint, then those of its adapter."""
    if model.adapter is not None:
        return [*weight_files(ModelPlan(model.model, model.header)), *weight_files(model.adapter)]
    names = {tensor.file for tensor in model.header.tensors.values()}
    return [WeightFile(model.model, _folder(model) / name) for name in sorted(names)]


def _folder(model: ModelPlan) -> Path:
    return find_model(model.model, ROOT)


def open_task_vectors(plan: Plan, threads: int, only: int | None = None) -> TaskVectors:
    """Open base and experts on this node as task vectors, streamed by `threads` threads. `only`: one expert's index."""
    keep_compiled()
    base = open_base(plan)
    chosen = plan.experts if only is None else plan.experts[only : only + 1]
    experts = [(expert.name, open_expert(expert, base)) for expert in chosen]
    return TaskVectors(base, experts, getattr(torch, plan.dtype), threads)
