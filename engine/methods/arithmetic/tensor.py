"""One tensor of a merge, as a method sees it: the base and the task vectors in blocks, the options' values, its seeds.

A method's `prepare` reads what it has to know of the whole tensor and returns a `Fill`, which computes any piece of it
in whatever thread. What stands in memory is a bounded number of elements, whatever the tensor's size and the number of
experts. Letters: N elements of a piece, B of a block, K experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.methods.arithmetic.kernels import absolute_sum, add, agree, finish
from engine.methods.arithmetic.selection import Threshold
from engine.methods.options import Value
from engine.sizes import ROOM, SMALLEST_BLOCK
from engine.task_vectors.buffers import ThreadMemory
from engine.task_vectors.coefficients import TensorCoefficients
from engine.task_vectors.kinds import TaskVector
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import Fill, all_finite, in_order
from engine.task_vectors.sums import merge_piece, whole

Block = npt.NDArray[np.float32]


class Sparse(Protocol):
    """Which elements of τₖ stay."""

    def state(self, piece: Piece) -> npt.NDArray[np.int64]:
        """What the blocks of a piece, in their order, hand on to each other."""

    def apply(self, k: int, start: int, tau_B: Block, state: npt.NDArray[np.int64]) -> None:
        """Zero the other elements of a block of τₖ, which begins at the tensor's element `start`."""


T = TypeVar("T")


# mergekit scales by no sum of absolute values that is smaller.
LEAST_NORM = 1e-7


_memory = ThreadMemory()


@dataclass(frozen=True)
class MergeTensor:
    """A tensor and what a method may know of it.

    `task_vectors`, None where an expert's tensor is the base's; `values` of the options that are one a tensor, `own` of
    those that are one an expert, `base_values` those of the base where it is listed among the models; `thresholds`: of
    the whole model, where the method asks for them.
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
    thresholds: Sequence[Threshold] | None = None

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.base.numel()

    def each_own(self, option: str) -> list[Any]:
        """An option's value for each expert."""
        return [mine[option] for mine in self.own]

    def seeds(self) -> list[int]:
        """A number of 64 bits for each expert, of the run's seed, the tensor and the expert alone."""
        return [_hash(f"{self.seed}\0{self.name}\0{model}") for model in self.models]

    def tensor_seed(self) -> int:
        """A number of 64 bits of the run's seed and the tensor alone."""
        return _hash(f"{self.seed}\0{self.name}")

    def each(self, of: Callable[[Piece], T]) -> Iterator[T]:
        """A function of every piece, in their order; a bounded number at work at a time."""
        todo = (partial(of, piece) for piece in pieces(self.name, self.shape))
        return in_order(todo, self.pool, 2 * self.threads)

    def blocks(self, piece: Piece, experts: Sequence[int]) -> Iterator[tuple[int, int, Tensor, Block]]:
        """The blocks of a piece: first and last element, the base [B] and τ of the experts [K, B], in float32.

        Both are this thread's memory, which the next block takes.
        """
        base_N = self.base.reshape(-1)
        size = max(SMALLEST_BLOCK, min(ROOM // 8, ROOM // max(1, len(experts))))
        row = self.shape[-1] if self.shape else 1
        size = size // row * row if 0 < row <= size else size
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
        """τₖ whole, float32, in the tensor's shape: for methods of matrices.

        Raises:
            CheckpointError: it has an element that is not finite.
        """
        task_vector = self.task_vectors[k]
        tau = torch.zeros(self.shape) if task_vector is None else whole(task_vector, self.base)
        self._check_finite(k, tau)
        return tau

    def sum_of_task_vectors(self, factors: Sequence[float]) -> Fill:
        """θ₀ + Σₖ factorₖ·τₖ."""
        wanted = self._coefficients(factors)
        return lambda piece, out_N: merge_piece(piece, self.base, self.task_vectors, wanted, out_N)

    def sum_of_models(self, own: float, factors: Sequence[float]) -> Fill:
        """own·θ₀ + Σₖ factorₖ·θₖ."""
        wanted = self._coefficients(factors)
        # What is given as a difference, or is the base's, brings the base with it.
        for factor, task_vector in zip(factors, self.task_vectors, strict=True):
            if task_vector is None or not task_vector.minus_base:
                own += factor
        return lambda piece, out_N: merge_piece(piece, self.base, self.task_vectors, wanted, out_N, base_weight=own)

    def summed(self, sparse: Sparse, factors: Sequence[float]) -> Fill:
        """θ₀ + Σₖ factorₖ·cₖ·τ̂ₖ, with cₖ as `rescale` says."""
        scaled = _float32(factor * c for factor, c in zip(factors, self._rescale(sparse), strict=True))

        def fill(piece: Piece, out_N: Tensor) -> None:
            for start, stop, base_B, tau_KB in self._sparse_blocks(piece, sparse):
                sum_B = base_B.numpy()
                for tau_B, factor in zip(tau_KB, scaled, strict=True):
                    add(sum_B, tau_B, factor)
                out_N[start - piece.start : stop - piece.start].copy_(base_B)

        return fill

    def elected(self, sparse: Sparse) -> Fill:
        """θ₀ + λ·Σ_A wₖ·cₖ·τ̂ₖ / Σ_A wₖ, where A are the experts that agree with the elected sign, for each element."""
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
                # Now, as what is trimmed, thinned or outvoted no longer shows in the result.
                self._check_finite(k, torch.from_numpy(tau_B))
                sparse.apply(k, start, tau_B, state)
            yield start, stop, base_B, tau_KB

    def _check_finite(self, k: int, tau_N: Tensor) -> None:
        if not all_finite(tau_N):
            raise CheckpointError(
                f"the tensor {self.name!r} has a weight that is NaN or infinite",
                f"expert {self.models[k]!r} or the base",
            )

    def _rescale(self, sparse: Sparse) -> list[float]:
        """cₖ of each expert: 1, 1/density, or what keeps Σ |τₖ|, which takes a pass over all of them."""
        experts = range(len(self.task_vectors))
        densities = [float(density) for density in self.each_own("density")]
        if not self.values["rescale"] or all(density >= 1 for density in densities):
            return [1.0] * len(experts)
        if self.values.get("rescale_by") == "density":
            return [1 / density if density > 0 else 1.0 for density in densities]

        def sums(piece: Piece) -> npt.NDArray[np.float64]:
            found = np.zeros((2, len(experts)))
            state = sparse.state(piece)
            for start, _, _, tau_KB in self.blocks(piece, experts):
                for k, tau_B in enumerate(tau_KB):
                    found[0, k] += absolute_sum(tau_B)
                    sparse.apply(k, start, tau_B, state)
                    found[1, k] += absolute_sum(tau_B)
            return found

        total = np.zeros((2, len(experts)))
        for part in self.each(sums):
            total += part
        return [before / after if min(before, after) >= LEAST_NORM else 1.0 for before, after in total.T.tolist()]

    def _coefficients(self, factors: Sequence[float]) -> TensorCoefficients:
        return TensorCoefficients((0, self.numel), np.array(_float32(factors), dtype=np.float32)[:, None])


def _float32(factors: Iterable[float]) -> list[np.float32]:
    """Rounded; one that is too large becomes infinite, and the result an error that names the tensor."""
    with np.errstate(over="ignore"):
        return [np.float32(factor) for factor in factors]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
