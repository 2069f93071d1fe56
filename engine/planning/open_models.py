"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoints.adapters import WEIGHTS, AdapterHeader
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import ModelHeader
from engine.checkpoints.tensors import BaseWithRows, Checkpoint
from engine.planning.plan import ExpertPlan, ModelPlan, Plan
from engine.task_vectors.experts import AdapterExpert, CheckpointWithAdapter, ExpertWeights, FullExpert
from engine.task_vectors.streams import TaskVectors


def open_base(plan: Plan) -> Checkpoint:
    """The base's weights, found by the plan's words on whatever node this is."""
    base = Checkpoint(_folder(plan.base), plan.base_header.tensors)
    if plan.rows is None:
        return base
    assert isinstance(plan.rows.header, ModelHeader)
    return BaseWithRows(base, Checkpoint(_folder(plan.rows), plan.rows.header.tensors), plan.rows.header)


def open_expert(expert: ExpertPlan, base: Checkpoint | None = None) -> ExpertWeights:
    """An expert's weights, against those of the base where they may be of another size."""
    if isinstance(expert.header, AdapterHeader):
        return _open_adapter(expert, expert.header)
    full = FullExpert(Checkpoint(_folder(expert), expert.header.tensors), base, expert.match)
    if expert.adapter is None:
        return full
    assert isinstance(expert.adapter.header, AdapterHeader)
    return CheckpointWithAdapter(full, _open_adapter(expert.adapter, expert.adapter.header))


def _open_adapter(model: ModelPlan, header: AdapterHeader) -> AdapterExpert:
    return AdapterExpert(Checkpoint(_folder(model), header.tensors), header.pairs)


def weight_files(model: ModelPlan) -> list[Path]:
    """The files that hold the model's weights."""
    if isinstance(model, ExpertPlan) and model.adapter is not None:
        return [*weight_files(ModelPlan(model.model, model.header)), *weight_files(model.adapter)]
    if isinstance(model.header, ModelHeader):
        return [_folder(model) / file for file in sorted({tensor.file for tensor in model.header.tensors.values()})]
    return [_folder(model) / WEIGHTS]


def _folder(model: ModelPlan) -> Path:
    return find_model(model.model, ROOT)


def open_task_vectors(plan: Plan, threads: int) -> TaskVectors:
    """The plan's models as streams, found by its words on whatever node this is."""
    base = open_base(plan)
    experts = [(expert.name, open_expert(expert, base)) for expert in plan.experts]
    return TaskVectors(base, experts, getattr(torch, plan.dtype), threads)
