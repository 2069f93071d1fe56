"""Streams over base and experts: merged tensors from coefficients, coefficient gradients from weight gradients.

The unit of work is a piece of a tensor. One thread processes it in blocks that fit a core's cache, with one pass over
each expert's bytes: float32 arithmetic, float64 sums over blocks. The result does not depend on the process, the thread
or the other pieces in flight. A task vector is never in memory as a whole.
Letters: N elements of a piece, K experts, m chunks of a tensor.
Source: Expert Merging, arXiv 2509.25712, θₗ = θ₀,ₗ + Σₖ Σₛ αₖ,ₗ,ₛ · τₖ,ₗ,ₛ and its chain rule.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.checkpoints.tensors import Checkpoint
from engine.errors import CheckpointError
from engine.task_vectors.coefficients import Array, TensorCoefficients
from engine.task_vectors.experts import ExpertWeights
from engine.task_vectors.factors import scaled_products
from engine.task_vectors.kinds import TaskVector
from engine.task_vectors.pieces import Piece
from engine.task_vectors.sums import inner_products, mean_magnitudes, merge_piece


@dataclass(frozen=True)
class Inspection:
    """Statistics of one tensor: `magnitudes` sₖ = mean |τₖ| of each expert, [K]."""

    magnitudes: Array


class TaskVectors:
    """The base and K experts as streams.

    Args:
        base: The base's tensors.
        experts: Name and weights of each expert.
        dtype: Dtype of merged tensors, unless a call names another.
        threads: Number of threads of `pool`, on which the methods for several pieces or tensors run.
    """

    def __init__(
        self, base: Checkpoint, experts: Sequence[tuple[str, ExpertWeights]], dtype: torch.dtype, threads: int
    ) -> None:
        self.base, self.experts, self.dtype, self.threads = base, experts, dtype, threads
        # One thread per piece and one intra-op thread: sums must not depend on the number of threads.
        self.pool = ThreadPoolExecutor(threads, "task-vectors", initializer=torch.set_num_threads, initargs=(1,))

    def merge(self, piece: Piece, wanted: TensorCoefficients, out_N: Tensor) -> None:
        """Write the merged elements of the piece to `out_N` [N], rounded once to its dtype."""
        base, task_vectors = self.base.read(piece.name), self.of(piece.name)
        if wanted.spectral:
            task_vectors = scaled_products(task_vectors, wanted)
            wanted = TensorCoefficients((0, base.numel()), np.ones((len(task_vectors), 1), np.float32))
        merge_piece(piece, base, task_vectors, wanted, out_N)

    def gradients(self, piece: Piece, gradient_N: Tensor, edges: tuple[int, ...]) -> Array:
        """Return the piece's part of ∂L/∂αₖ,ₗ,ₛ = ⟨Gₗ,ₛ, τₖ,ₗ,ₛ⟩, [K, m] float64, from its part [N] of G = ∂L/∂θ."""
        return inner_products(piece, gradient_N, self.base.read(piece.name), self.of(piece.name), edges)

    def merge_all(
        self, wanted: Mapping[Piece, TensorCoefficients], dtype: torch.dtype | None = None
    ) -> dict[Piece, Tensor]:
        """Return the merged elements [N] of several pieces in `dtype` (default: the dtype of these streams)."""

        def merged(piece: Piece) -> Tensor:
            out_N = torch.empty(piece.numel, dtype=dtype or self.dtype)
            self.merge(piece, wanted[piece], out_N)
            return out_N

        return dict(zip(wanted, self.pool.map(merged, wanted), strict=True))

    def gradients_all(
        self, weight_gradients: Mapping[Piece, Tensor], edges: Mapping[str, tuple[int, ...]]
    ) -> dict[Piece, Array]:
        """Return, for several pieces, their parts [K, m] of the coefficient gradients; see `gradients`."""

        def gradient(piece: Piece) -> Array:
            return self.gradients(piece, weight_gradients[piece], edges[piece.name])

        return dict(zip(weight_gradients, self.pool.map(gradient, weight_gradients), strict=True))

    def inspect(self, names: Iterable[str], with_base: bool = True) -> dict[str, Inspection]:
        """Read the named tensors of base and experts once and return their statistics.

        Without `with_base`, the base is read and checked only where a task vector is a difference.

        Raises:
            CheckpointError: a tensor has a NaN or infinite weight; the error names the tensor and the model.
        """
        names = list(names)
        inspections = self.pool.map(partial(self.inspection, with_base=with_base), names)
        return dict(zip(names, inspections, strict=True))

    def inspection(self, name: str, with_base: bool = True) -> Inspection:
        """Return the statistics of one tensor; see `inspect`."""
        header, task_vectors = self.base.tensors[name], self.of(name)
        if not header.dtype.startswith(("F", "BF")):
            return Inspection(np.zeros(len(self.experts)))
        needed = with_base or any(task_vector is not None and task_vector.minus_base for task_vector in task_vectors)
        base = self.base.read(name) if needed else torch.empty(header.shape, device="meta")
        base_magnitude, magnitudes = mean_magnitudes(base, task_vectors)
        owners = ["the base", *(f"expert {model!r}" for model, _ in self.experts)]
        for owner, magnitude in zip(owners, [base_magnitude, *magnitudes], strict=True):
            # A sum of absolute values is finite only if every value is, so the check needs no reading of its own.
            if not np.isfinite(magnitude):
                raise CheckpointError(f"the tensor {name!r} has a NaN or infinite weight", owner)
        return Inspection(magnitudes)

    def over(self, experts: Sequence[tuple[str, ExpertWeights]]) -> TaskVectors:
        """Return streams over other experts of the same base, on the same pool."""
        others = copy.copy(self)
        others.experts = experts
        return others

    def of(self, name: str) -> list[TaskVector | None]:
        """Return τₖ of the tensor `name` for each expert, None if the expert does not change it."""
        return [expert.task_vector(name) for _, expert in self.experts]
