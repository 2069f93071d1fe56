"""A loaded model whose merged tensors are set from any table of coefficients, to compare merges without Ray.

The base has all coefficients 0, expert k has 1 in row k, and Task Arithmetic has the prior.
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
    """A model that can be set to any merge of a plan; also the `PieceSink` that receives the merged pieces."""

    def __init__(self, plan: Plan) -> None:
        self.plan, folder = plan, base_folder(plan)
        self.shards = LocalShards(plan, torch.get_num_threads(), overlap=False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, plan.dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in plan.merged:
            # transformers may have memory-mapped the file, which must not be written to.
            parameter = self.model.get_parameter(name)
            parameter.data = parameter.data.clone()

    def set(self, coefficients: Coefficients):
        """Merge by these coefficients and return the model."""
        for arriving in self.shards.merge(coefficients, self).values():
            for arrival in arriving:
                arrival.result()
        return self.model

    def buffer(self, piece: Piece) -> Tensor:
        """Return the part of the model's memory that a merged piece is written to."""
        return self.model.get_parameter(piece.name).data.view(-1)[piece.start : piece.stop]

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """Do nothing: the piece has been written to the model's memory."""

    def constant(self, weights: list[float]) -> Coefficients:
        """Return coefficients that are equal for all tensors of an expert; `weights` has one per expert."""
        return Coefficients.constant(first_stage(self.plan).layout, weights)

    def expert(self, index: int) -> Coefficients:
        """Return the coefficients that give expert `index` unchanged."""
        return self.constant(np.eye(len(self.plan.experts))[index].tolist())
