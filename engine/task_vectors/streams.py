"""Streams over the checkpoints: merged tensors from coefficients, coefficient gradients from weight gradients.

All work that grows with the number of experts is here. The unit of work is a piece of a tensor, gone through by one
thread in blocks that fit a core's cache: one pass over each expert's bytes, in float32, with the sums of blocks in
float64. The result does not depend on who computes it, nor beside whom; no task vector ever stands whole. Knows no
models and no Ray.
Letters: N elements of a flattened tensor, B of a block, K experts, G experts of a group, m chunks of the tensor.
Source: Expert Merging, arXiv 2509.25712, θₗ = θ₀,ₗ + Σₖ Σₛ αₖ,ₗ,ₛ · τₖ,ₗ,ₛ and its chain rule.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.checkpoints.tensors import Checkpoint
from engine.errors import CheckpointError
from engine.task_vectors.coefficients import Array, TensorCoefficients
from engine.task_vectors.experts import ExpertWeights
from engine.task_vectors.kinds import TaskVector
from engine.task_vectors.pieces import Piece
from engine.task_vectors.sums import inner_products, mean_magnitudes, merge_piece


@dataclass(frozen=True)
class Inspection:
    """What a first reading of one tensor tells: sₖ = mean |τₖ| of each expert, [K]."""

    magnitudes: Array


class TaskVectors:
    """The base and K experts as streams; what is computed for several pieces is computed on `pool`."""

    def __init__(
        self, base: Checkpoint, experts: Sequence[tuple[str, ExpertWeights]], dtype: torch.dtype, threads: int
    ) -> None:
        self.base, self.experts, self.dtype, self.threads = base, experts, dtype, threads
        # One thread a piece, and none inside an operation: sums must not depend on how many threads there are.
        self.pool = ThreadPoolExecutor(threads, "task-vectors", initializer=torch.set_num_threads, initargs=(1,))

    def merge(self, piece: Piece, wanted: TensorCoefficients, out_N: Tensor) -> None:
        """Write the merged tensor's elements of the piece to `out_N` [piece.numel], rounded once to its dtype."""
        merge_piece(piece, self.base.read(piece.name), self.of(piece.name), wanted, out_N)

    def gradients(self, piece: Piece, gradient_N: Tensor, edges: tuple[int, ...]) -> Array:
        """What the piece adds to ∂L/∂αₖ,ₗ,ₛ = ⟨Gₗ,ₛ, τₖ,ₗ,ₛ⟩ [K, m], from its elements of G, `gradient_N`."""
        return inner_products(piece, gradient_N, self.base.read(piece.name), self.of(piece.name), edges)

    def merge_all(
        self, wanted: Mapping[Piece, TensorCoefficients], dtype: torch.dtype | None = None
    ) -> dict[Piece, Tensor]:
        """The merged elements of several pieces, in `dtype` (the run's if None)."""

        def one(piece: Piece) -> Tensor:
            out_N = torch.empty(piece.numel, dtype=dtype or self.dtype)
            self.merge(piece, wanted[piece], out_N)
            return out_N

        return dict(zip(wanted, self.pool.map(one, wanted), strict=True))

    def gradients_all(
        self, weight_gradients: Mapping[Piece, Tensor], edges: Mapping[str, tuple[int, ...]]
    ) -> dict[Piece, Array]:
        """What several pieces add to their tensors' coefficient gradients."""

        def one(piece: Piece) -> Array:
            return self.gradients(piece, weight_gradients[piece], edges[piece.name])

        return dict(zip(weight_gradients, self.pool.map(one, weight_gradients), strict=True))

    def inspect(self, names: Iterable[str]) -> dict[str, Inspection]:
        """Read the given tensors of base and experts once.

        Raises:
            CheckpointError: a weight that is NaN or infinite, named with its tensor and model.
        """
        names = list(names)
        return dict(zip(names, self.pool.map(self._inspect, names), strict=True))

    def _inspect(self, name: str) -> Inspection:
        base = self.base.read(name)
        if not base.is_floating_point():
            return Inspection(np.zeros(len(self.experts)))
        base_magnitude, magnitudes = mean_magnitudes(base, self.of(name))
        owners = ["the base", *(f"expert {model!r}" for model, _ in self.experts)]
        for owner, magnitude in zip(owners, [base_magnitude, *magnitudes], strict=True):
            # A sum of absolute values is finite only if all of them are, so the check costs no reading of its own.
            if not np.isfinite(magnitude):
                raise CheckpointError(f"the tensor {name!r} has a weight that is NaN or infinite", owner)
        return Inspection(magnitudes)

    def over(self, experts: Sequence[tuple[str, ExpertWeights]]) -> TaskVectors:
        """Streams over other experts of the same base, on the same pool."""
        others = copy.copy(self)
        others.experts = experts
        return others

    def of(self, name: str) -> list[TaskVector | None]:
        """τₖ of a tensor, of each expert; None where it is the base's."""
        return [expert.task_vector(name) for _, expert in self.experts]
