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
import math
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, Expert, Operand, TaskVector, as_operand, open_base, open_expert
from engine.coefficients import TensorCoefficients
from engine.errors import CheckpointError
from engine.kernels import add_differences
from engine.kernels import inner_products as add_inner_products
from engine.plan import Plan
from engine.sizes import BLOCK, GROUP, PIECE

Array = npt.NDArray[np.float64]

# Each thread keeps the memory of its blocks for good, since fresh memory would cost more than the sums.
_local = threading.local()


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of the flattened tensor `name`."""

    name: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def pieces(name: str, shape: Sequence[int]) -> Iterator[Piece]:
    """The pieces of a tensor: whole blocks, so that its shape alone decides how its sums are ordered."""
    numel, block = math.prod(shape), _block_size(shape)
    size = max(1, PIECE // block) * block
    return (Piece(name, start, min(start + size, numel)) for start in range(0, numel, size))


def blocks(shape: Sequence[int], start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Where the blocks of a flattened tensor begin and end, between `start` and `stop`."""
    stop, size = math.prod(shape) if stop is None else stop, _block_size(shape)
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def _block_size(shape: Sequence[int]) -> int:
    """Whole rows of the last dimension where they fit: what a product of two factors gives without waste."""
    row = shape[-1] if shape else 1
    return BLOCK // row * row if 0 < row <= BLOCK else BLOCK


@dataclass(frozen=True)
class Inspection:
    """What a first reading of one tensor tells: sₖ = mean |τₖ| of each expert, [K]."""

    magnitudes: Array


class TaskVectors:
    """The base and K experts as streams; what is computed for several pieces is computed on `pool`."""

    def __init__(
        self, base: Checkpoint, experts: Sequence[tuple[str, Expert]], dtype: torch.dtype, threads: int
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

    def over(self, experts: Sequence[tuple[str, Expert]]) -> TaskVectors:
        """Streams over other experts of the same base, on the same pool."""
        others = copy.copy(self)
        others.experts = experts
        return others

    def of(self, name: str) -> list[TaskVector | None]:
        """τₖ of a tensor, of each expert; None where it is the base's."""
        return [expert.task_vector(name) for _, expert in self.experts]


def open_task_vectors(plan: Plan, threads: int) -> TaskVectors:
    """The plan's models as streams, found by its words on whatever node this is."""
    base = open_base(plan)
    experts = [(expert.name, open_expert(expert, base)) for expert in plan.experts]
    return TaskVectors(base, experts, getattr(torch, plan.dtype), threads)


def whole(task_vector: TaskVector, base: Tensor) -> Tensor:
    """τ of one tensor as it stands, float32 in the base's shape: for what takes matrices apart."""
    out_N = torch.empty(base.numel())
    task_vector.block(0, base.numel(), base.reshape(-1).float(), out_N)
    return out_N.view(base.shape)


def merge_piece(
    piece: Piece,
    base: Tensor,
    task_vectors: Sequence[TaskVector | None],
    wanted: TensorCoefficients,
    out_N: Tensor,
    own: float | None = None,
) -> None:
    """θ = θ₀ + Σₖ Σₛ αₖ,ₛ · τₖ,ₛ of one piece; a float32 sum over k, rounded once to the dtype of `out_N`.

    With `own` the sum is own · θ₀ + Σₖ αₖ · θₖ instead, of what is given whole; of what is given as τₖ it is αₖ · τₖ.
    """
    groups, base_N = _groups(task_vectors), base.reshape(-1)
    values_mG = [np.ascontiguousarray(_filled(wanted.values[group]).T) for group in groups]
    for start, stop in blocks(base.shape, piece.start, piece.stop):
        room = _room(stop - start)
        base_B, sum_B = room.float32(base_N[start:stop]), room.other_B
        # Summed in a buffer of our own: where an output lies in memory must not decide its last bit.
        torch.mul(base_B, 1.0 if own is None else own, out=sum_B)
        subtracted, sums = as_operand(base_B if own is None else room.zero_B), as_operand(sum_B)
        for group, values in zip(groups, values_mG, strict=True):
            operands = room.operands(task_vectors, group, start, stop, subtracted)
            for chunk, first, last in _chunks_within(wanted.edges, start, stop):
                add_differences(sums, *operands, values[chunk], first, last)
        out_N[start - piece.start : stop - piece.start].copy_(sum_B)


def inner_products(
    piece: Piece,
    gradient_N: Tensor,
    base: Tensor,
    task_vectors: Sequence[TaskVector | None],
    edges: tuple[int, ...],
) -> Array:
    """⟨Gₛ, τₖ,ₛ⟩ of one piece, [K, m]: products in float32, sums of spans and blocks in float64.

    τ is formed before the product: the difference of ⟨G, θₖ⟩ and ⟨G, θ₀⟩ would cancel.
    """
    groups, base_N = _groups(task_vectors), base.reshape(-1)
    sums_mG = [np.zeros((len(edges) - 1, GROUP)) for _ in groups]
    for start, stop in blocks(base.shape, piece.start, piece.stop):
        room = _room(stop - start)
        base_B, slope_B = room.float32(base_N[start:stop]), room.other_B
        slope_B.copy_(gradient_N[start - piece.start : stop - piece.start])
        subtracted, slope = as_operand(base_B), as_operand(slope_B)
        for group, sums in zip(groups, sums_mG, strict=True):
            operands = room.operands(task_vectors, group, start, stop, subtracted)
            for chunk, first, last in _chunks_within(edges, start, stop):
                add_inner_products(sums[chunk], slope, *operands, first, last)
    products_Km = np.zeros((len(task_vectors), len(edges) - 1))
    for group, sums in zip(groups, sums_mG, strict=True):
        products_Km[group] = sums.T[: len(group)]
    return products_Km


def mean_magnitudes(base: Tensor, task_vectors: Sequence[TaskVector | None]) -> tuple[float, Array]:
    """mean |θ₀| and sₖ = mean |τₖ| [K] of one tensor; sums of blocks in float64."""
    base_sum, sums = 0.0, np.zeros(len(task_vectors))
    base_N = base.reshape(-1)
    for start, stop in blocks(base.shape):
        room = _room(stop - start)
        base_B = room.float32(base_N[start:stop])
        base_sum += _sum(torch.abs(base_B, out=room.other_B))
        for k, task_vector in enumerate(task_vectors):
            if task_vector is not None:
                task_vector.block(start, stop, base_B, room.other_B)
                sums[k] += _sum(room.other_B.abs_())
    count = max(1, base.numel())
    return base_sum / count, sums / count


def _sum(block_B: Tensor) -> float:
    """The sum of a block: in float64, which takes a copy of the block, only where float32 overflows."""
    total = block_B.sum().item()
    return total if math.isfinite(total) else block_B.sum(dtype=torch.float64).item()


def _groups(task_vectors: Sequence[TaskVector | None]) -> list[list[int]]:
    """The experts that change the tensor, a few at a time, in their order; those of a group are stored alike."""
    groups: list[list[int]] = []
    for k, task_vector in enumerate(task_vectors):
        if task_vector is None:
            continue
        last = task_vectors[groups[-1][0]] if groups and len(groups[-1]) < GROUP else None
        if last is not None and last.minus_base == task_vector.minus_base:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def _filled(values_Gm: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """With zeros in place of the experts that a group lacks."""
    return np.concatenate([values_Gm, np.zeros((GROUP - len(values_Gm), values_Gm.shape[1]), np.float32)])


def _chunks_within(edges: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The chunks that a block meets: number, first and last element as places in the block."""
    chunk = bisect_right(edges, start) - 1
    while chunk < len(edges) - 1 and edges[chunk] < stop:
        yield chunk, max(edges[chunk], start) - start, min(edges[chunk + 1], stop) - start
        chunk += 1


@dataclass(frozen=True)
class _Room:
    """Memory for one block, in float32: of the base, another one, zeros, and one for each expert of a group."""

    base_B: Tensor
    other_B: Tensor
    zero_B: Tensor
    expert_GB: tuple[Tensor, ...]

    def float32(self, base_B: Tensor) -> Tensor:
        """A block of the base, converted where it has to be."""
        return base_B if base_B.dtype == torch.float32 else self.base_B.copy_(base_B)

    def operands(
        self, task_vectors: Sequence[TaskVector | None], group: Sequence[int], start: int, stop: int, base_B: Operand
    ) -> list[Operand]:
        """What a kernel subtracts, and what it subtracts it from, four times; a group that lacks some repeats one."""
        members = [task_vector for k in group if (task_vector := task_vectors[k]) is not None]
        found = [one.operand(start, stop, room) for one, room in zip(members, self.expert_GB, strict=False)]
        subtracted = base_B if members[0].minus_base else as_operand(self.zero_B)
        return [subtracted, *found, *[found[-1]] * (GROUP - len(found))]


def _room(count: int) -> _Room:
    """This thread's room for a block of `count` elements."""
    if not hasattr(_local, "memory"):
        _local.memory = torch.zeros(3 + GROUP, BLOCK)
    if not hasattr(_local, "room") or _local.room.base_B.numel() != count:
        base_B, other_B, zero_B, *expert_GB = _local.memory[:, :count]
        _local.room = _Room(base_B, other_B, zero_B, tuple(expert_GB))
    room: _Room = _local.room
    return room
