"""One loaded model whose merged tensors are set from any table of coefficients: how the quickstart compares merges.

Base is all zeros, expert k is 1 in row k, Task Arithmetic is the prior; the engine does the rest. Knows no Ray.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint import open_base, open_expert
from engine.coefficients import Coefficients
from engine.plan import Plan
from engine.task_vectors import LocalShards, TaskVectors
from engine.training import first_stage


class MergedModels:
    def __init__(self, plan: Plan) -> None:
        self.plan, base = plan, open_base(plan)
        experts = [(expert.name, open_expert(expert)) for expert in plan.experts]
        self.streams = TaskVectors(base, experts, getattr(torch, plan.dtype), torch.get_num_threads())
        self.shards = LocalShards(self.streams)
        self.model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, plan.dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base.folder)
        self._parameters = dict(self.model.named_parameters())

    @torch.no_grad()
    def set(self, coefficients: Coefficients):
        """The model, merged by these coefficients."""
        self.shards.merge(coefficients, lambda name, tensor: self._parameters[name].copy_(tensor))
        return self.model

    def constant(self, weights: list[float]) -> Coefficients:
        """The same coefficient for every tensor of an expert."""
        return Coefficients.constant(first_stage(self.plan).layout, weights)

    def expert(self, index: int) -> Coefficients:
        """Expert `index` as it is."""
        return self.constant(np.eye(len(self.plan.experts))[index].tolist())
