"""The input of a weight-space method, one tensor of a merge: base, task vectors, option values and seeds.

A method's `prepare` makes its passes over the whole tensor and returns a `Fill`, which computes any piece of it in any
thread. The number of elements in memory is bounded, independent of the tensor's size and the number of experts.
Letters: N elements of a piece, B of a block, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.methods.arithmetic.kernels import absolute_sum, add, agree, finish
from engine.methods.options import Value
from engine.sizes import ROOM, SMALLEST_BLOCK
from engine.statistics.moments import TensorStatistics
from engine.task_vectors.buffers import ThreadMemory
from engine.task_vectors.coefficients import TensorCoefficients
from engine.task_vectors.kinds import TaskVector
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import Fill, all_finite, in_order
from engine.task_vectors.rounding import seed_of
from engine.task_vectors.sums import merge_piece, whole

T = TypeVar("T")
Block = npt.NDArray[np.float32]

# As in mergekit, a smaller sum of absolute values does not rescale.
LEAST_NORM = 1e-7

_memory = ThreadMemory()


class Sparse(Protocol):
    """The choice of the elements of τₖ that are kept."""

    def state(self, piece: Piece) -> npt.NDArray[np.int64]:
        """Return the state of a piece, which `apply` updates from block to block."""

    def apply(self, k: int, start: int, tau_B: Block, state: npt.NDArray[np.int64]) -> None:
        """Zero the elements of a block of τₖ that are not kept.

        The blocks of a piece are passed in order.

        Args:
            k: The expert.
            start: Index in the tensor of the block's first element.
            tau_B: The block of τₖ, changed in place.
            state: The state of the piece, changed in place.
        """


@dataclass(frozen=True)
class MergeTensor:
    """One tensor of a merge.

    Attributes:
        name: The tensor's name.
        shape: Its shape.
        base: The base's tensor.
        models: Names of the K experts.
        task_vectors: Their task vectors; None for an expert whose tensor equals the base's.
        values: Values of the options with scope `merge`.
        own: Values of the options with scope `expert` or `model`, per expert.
        base_values: Values of the options with scope `model` for the base; None if the base is not one of the models.
        seed: Seed of the run.
        pool, threads: Executor of the passes over the tensor, and its number of threads.
        experts_in_all: Number of experts of the merge, which may be more than K (svd_intermediate).
        has_base: The config has a base.
        base_place: Position of the base among the models, if it is listed there.
        is_vocabulary: The tensor has one row per token.
        known: Results of the method's prepasses, of all experts of the merge; see `engine.methods.prepass`.
        statistics: Statistics of each expert, if the method uses them.
        base_statistics: Those of the base.
    """

    name: str
    shape: tuple[int, ...]
    base: Tensor
    models: tuple[str, ...]
    task_vectors: Sequence[TaskVector | None]
    values: dict[str, Value]
    own: Sequence[dict[str, Value]]
    base_values: dict[str, Value] | None
    seed: int
    pool: Executor
    threads: int
    experts_in_all: int
    has_base: bool = True
    base_place: int | None = None
    is_vocabulary: bool = False
    known: Mapping[str, Any] = field(default_factory=dict)
    statistics: Sequence[TensorStatistics | None] = ()
    base_statistics: TensorStatistics | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return self.base.numel()

    def each_own(self, option: str) -> list[Any]:
        """Return an option's value for each expert."""
        return [values[option] for values in self.own]

    def seeds(self) -> list[int]:
        """Return a 64-bit seed per expert, which depends on the run's seed, the tensor and the expert's name alone."""
        return [seed_of(f"{self.seed}\0{self.name}\0{model}") for model in self.models]

    def tensor_seed(self) -> int:
        """Return a 64-bit seed, which depends on the run's seed and the tensor alone."""
        return seed_of(f"{self.seed}\0{self.name}")

    def each(self, of: Callable[[Piece], T]) -> Iterator[T]:
        """Yield the results of `of` for all pieces in order, with a bounded number in flight on `pool`."""
        todo = (partial(of, piece) for piece in pieces(self.name, self.shape))
        return in_order(todo, self.pool, 2 * self.threads)

    def block_size(self, experts: int) -> int:
        """Return the elements of a block with that many experts; whole rows of the last dimension if one fits."""
        size = max(SMALLEST_BLOCK, min(ROOM // 8, ROOM // max(1, experts)))
        row = self.shape[-1] if self.shape else 1
        return size // row * row if 0 < row <= size else size

    def blocks(self, piece: Piece, experts: Sequence[int]) -> Iterator[tuple[int, int, Tensor, Block]]:
        """Yield the blocks of a piece: first and last element, base [B] and τ of the given experts [K, B], float32.

        Both arrays are buffers of this thread, overwritten by the next block.
        """
        base_N, size = self.base.reshape(-1), self.block_size(len(experts))
        memory = _memory.take((1 + len(experts)) * size, at_least=2 * ROOM)
        for start in range(piece.start, piece.stop, size):
            stop = min(start + size, piece.stop)
            count = stop - start
            base_B = memory[:count].copy_(base_N[start:stop])
            tau_KB = memory[count : (1 + len(experts)) * count].view(len(experts), count)
            for tau_B, k in zip(tau_KB, experts, strict=True):
                task_vector = self.task_vectors[k]
                if task_vector is None:
                    tau_B.zero_()
                else:
                    task_vector.block(start, stop, base_B, tau_B)
            yield start, stop, base_B, tau_KB.numpy()

    def task_vector(self, k: int) -> Tensor:
        """Return τₖ as a whole, float32 in the tensor's shape, for matrix methods.

        Raises:
            CheckpointError: τₖ has a NaN or infinite element.
        """
        task_vector = self.task_vectors[k]
        tau = torch.zeros(self.shape) if task_vector is None else whole(task_vector, self.base)
        self.check_finite(k, tau)
        return tau

    def sum_of_task_vectors(self, factors: Sequence[float]) -> Fill:
        """Return the fill of θ₀ + Σₖ factorₖ·τₖ."""
        wanted = self._coefficients(factors)
        return lambda piece, out_N: merge_piece(piece, self.base, self.task_vectors, wanted, out_N)

    def sum_of_models(self, base_weight: float, factors: Sequence[float]) -> Fill:
        """Return the fill of base_weight·θ₀ + Σₖ factorₖ·θₖ."""
        wanted = self._coefficients(factors)
        # θₖ = θ₀ + τₖ for an expert that is read as τₖ, or that equals the base.
        for factor, task_vector in zip(factors, self.task_vectors, strict=True):
            if task_vector is None or not task_vector.minus_base:
                base_weight += factor
        return lambda piece, out_N: merge_piece(
            piece, self.base, self.task_vectors, wanted, out_N, base_weight=base_weight
        )

    def summed(self, sparse: Sparse, factors: Sequence[float]) -> Fill:
        """Return the fill of θ₀ + Σₖ factorₖ·cₖ·τ̂ₖ, with τ̂ₖ from `sparse` and the scale cₖ from `rescale`."""
        scaled = _float32(factor * c for factor, c in zip(factors, self._rescale(sparse), strict=True))

        def fill(piece: Piece, out_N: Tensor) -> None:
            for start, stop, base_B, tau_KB in self._sparse_blocks(piece, sparse):
                sum_B = base_B.numpy()
                for tau_B, factor in zip(tau_KB, scaled, strict=True):
                    add(sum_B, tau_B, factor)
                out_N[start - piece.start : stop - piece.start].copy_(base_B)

        return fill

    def elected(self, sparse: Sparse) -> Fill:
        """Return the fill of θ₀ + λ·Σ_A wₖ·cₖ·τ̂ₖ / Σ_A wₖ.

        A is, per element, the set of experts that agree with the elected sign; see `engine.methods.ties`.
        """
        weights = [float(weight) for weight in self.each_own("weight")]
        factors = _float32(w * c for w, c in zip(weights, self._rescale(sparse), strict=True))
        by_count = self.values.get("divide_by") == "count"
        counted = _float32(1.0 if by_count else weight for weight in weights)
        if not self.values["normalize"]:
            counted = [np.float32(0)] * len(weights)
        (factor,) = _float32([float(self.values["lambda"])])

        def fill(piece: Piece, out_N: Tensor) -> None:
            for start, stop, base_B, tau_KB in self._sparse_blocks(piece, sparse):
                sign_B, sum_B, divisor_B = np.zeros((3, stop - start), dtype=np.float32)
                for tau_B, w in zip(tau_KB, factors, strict=True):
                    add(sign_B, tau_B, w)
                for tau_B, w, weight in zip(tau_KB, factors, counted, strict=True):
                    agree(sum_B, divisor_B, sign_B, tau_B, w, weight)
                finish(base_B.numpy(), sum_B, divisor_B, factor)
                out_N[start - piece.start : stop - piece.start].copy_(torch.from_numpy(sum_B))

        return fill

    def _sparse_blocks(self, piece: Piece, sparse: Sparse) -> Iterator[tuple[int, int, Tensor, Block]]:
        state = sparse.state(piece)
        for start, stop, base_B, tau_KB in self.blocks(piece, range(len(self.task_vectors))):
            for k, tau_B in enumerate(tau_KB):
                # Checked before elements are dropped or outvoted, which would hide them from the check of the result.
                self.check_finite(k, torch.from_numpy(tau_B))
                sparse.apply(k, start, tau_B, state)
            yield start, stop, base_B, tau_KB

    def check_finite(self, k: int, tau: Tensor) -> None:
        """Raise a CheckpointError if an element of τₖ, or of a part or factor of it, is NaN or infinite."""
        check_finite(self.name, self.models[k], tau)

    def _rescale(self, sparse: Sparse) -> list[float]:
        """Return cₖ of each expert: 1, 1/density, or the scale that preserves Σ |τₖ|, which takes a pass over all."""
        experts = range(len(self.task_vectors))
        densities = [float(density) for density in self.each_own("density")]
        if not self.values["rescale"] or all(density >= 1 for density in densities):
            return [1.0] * len(experts)
        if self.values.get("rescale_by") == "density":
            return [1 / density if density > 0 else 1.0 for density in densities]

        def sums(piece: Piece) -> npt.NDArray[np.float64]:
            before_after = np.zeros((2, len(experts)))
            state = sparse.state(piece)
            for start, _, _, tau_KB in self.blocks(piece, experts):
                for k, tau_B in enumerate(tau_KB):
                    before_after[0, k] += absolute_sum(tau_B)
                    sparse.apply(k, start, tau_B, state)
                    before_after[1, k] += absolute_sum(tau_B)
            return before_after

        total = np.zeros((2, len(experts)))
        for part in self.each(sums):
            total += part
        return [before / after if min(before, after) >= LEAST_NORM else 1.0 for before, after in total.T.tolist()]

    def _coefficients(self, factors: Sequence[float]) -> TensorCoefficients:
        return TensorCoefficients((0, self.numel), np.array(_float32(factors), dtype=np.float32)[:, None])


def check_finite(name: str, model: str, tau: Tensor) -> None:
    """Check that the elements of an expert's task vector, or of a part or factor of it, are finite.

    Raises:
        CheckpointError: one is not.
    """
    if not all_finite(tau):
        raise CheckpointError(f"the tensor {name!r} has a NaN or infinite weight", f"expert {model!r} or the base")


def _float32(factors: Iterable[float]) -> list[np.float32]:
    """Round to float32. A factor that overflows becomes infinite, and the check of the result then names the tensor."""
    with np.errstate(over="ignore"):
        return [np.float32(factor) for factor in factors]
