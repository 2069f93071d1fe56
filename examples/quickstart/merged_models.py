"""A loaded model whose merged tensors are set from any table of coefficients, to compare merges without Ray.

The base has all coefficients 0, expert k has 1 in row k, and Task Arithmetic has its weight.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.planning.factors import decomposed
from engine.planning.open_models import base_folder, open_task_vectors
from engine.planning.plan import Plan
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import orthogonalise
from engine.storage.paths import open_folder
from engine.task_vectors.coefficients import ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece


class MergedModels:
    """A model that can be set to any merge of a plan; also the `PieceSink` that receives the merged pieces.

    Args:
        plan: The plan.
        scratch: An empty folder for orthogonal task vectors; needed if the plan has such.
    """

    def __init__(self, plan: Plan, scratch: Path | None = None) -> None:
        self.plan, folder, threads = plan, base_folder(plan), torch.get_num_threads()
        state = open_folder(scratch) if scratch is not None else None
        if state is not None:
            orthogonalise(plan, open_task_vectors(plan, threads), state, decomposed(plan), decomposed(plan))
        self.shards = LocalShards(plan, threads, overlap=False, state=state)
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
        layout = ChunkLayout.make(self.plan.numels, dict.fromkeys(self.plan.merged, 1))
        return Coefficients.constant(layout, weights)

    def expert(self, index: int) -> Coefficients:
        """Return the coefficients that give expert `index` unchanged."""
        return self.constant(np.eye(len(self.plan.experts))[index].tolist())
