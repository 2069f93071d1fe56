"""One loaded model whose merged tensors are set from any table of coefficients: how the quickstart compares merges.

Base is all zeros, expert k is 1 in row k, Task Arithmetic is the prior; the engine does the rest. Knows no Ray.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.learning.learner import first_stage
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan
from engine.shards.local_shards import LocalShards
from engine.task_vectors.coefficients import Coefficients
from engine.task_vectors.pieces import Piece


class MergedModels:
    """It is where merged pieces go, too: `engine.shards.protocol.Model`."""

    def __init__(self, plan: Plan) -> None:
        self.plan, folder = plan, base_folder(plan)
        self.shards = LocalShards(plan, torch.get_num_threads(), overlap=False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, plan.dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in plan.merged:
            # What transformers loaded may be the file's own memory.
            parameter = self.model.get_parameter(name)
            parameter.data = parameter.data.clone()

    def set(self, coefficients: Coefficients):
        """The model, merged by these coefficients."""
        for arriving in self.shards.merge(coefficients, self).values():
            for arrival in arriving:
                arrival.result()
        return self.model

    def buffer(self, piece: Piece) -> Tensor:
        return self.model.get_parameter(piece.name).data.view(-1)[piece.start : piece.stop]

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """It was written to the model's own memory."""

    def constant(self, weights: list[float]) -> Coefficients:
        """The same coefficient for every tensor of an expert."""
        return Coefficients.constant(first_stage(self.plan).layout, weights)

    def expert(self, index: int) -> Coefficients:
        """Expert `index` as it is."""
        return self.constant(np.eye(len(self.plan.experts))[index].tolist())
