"""The streamed sums over task vectors: merged pieces, inner products with gradients, mean magnitudes.

Letters: N elements of a piece, B of a block, K experts, G experts of a group (`GROUP`), m chunks of the tensor.
Source: Expert Merging, arXiv 2509.25712, θₗ = θ₀,ₗ + Σₖ Σₛ αₖ,ₗ,ₛ · τₖ,ₗ,ₛ and its chain rule.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.sizes import BLOCK, GROUP
from engine.task_vectors.buffers import ThreadMemory
from engine.task_vectors.coefficients import Array, TensorCoefficients
from engine.task_vectors.kernels import add_differences
from engine.task_vectors.kernels import inner_products as add_inner_products
from engine.task_vectors.kinds import Operand, TaskVector, as_operand
from engine.task_vectors.pieces import Piece, blocks


class _PerThread(threading.local):
    """The buffers of the thread's last block size, and their memory."""

    def __init__(self) -> None:
        self.memory = ThreadMemory()
        self.buffers: _Buffers | None = None


_threads = _PerThread()


def whole(task_vector: TaskVector, base: Tensor) -> Tensor:
    """Return τ of one tensor as a whole, float32 in the base's shape, for methods that decompose matrices."""
    out_N = torch.empty(base.numel())
    task_vector.block(0, base.numel(), base.reshape(-1).float(), out_N)
    return out_N.view(base.shape)


def merge_piece(
    piece: Piece,
    base: Tensor,
    task_vectors: Sequence[TaskVector | None],
    wanted: TensorCoefficients,
    out_N: Tensor,
    base_weight: float | None = None,
) -> None:
    """Write θ = θ₀ + Σₖ Σₛ αₖ,ₛ · τₖ,ₛ of one piece to `out_N` [N]: a float32 sum over k, rounded once to its dtype.

    `base` is the whole tensor, of any shape and float dtype; `task_vectors` [K] has None for an expert equal to it.
    With `base_weight` the result is base_weight · θ₀ + Σₖ αₖ · xₖ, where xₖ is θₖ for a full checkpoint and τₖ for an
    adapter.
    """
    groups, base_N = _groups(task_vectors), base.reshape(-1)
    values_mG = [np.ascontiguousarray(_filled(wanted.values[group]).T) for group in groups]
    for start, stop in blocks(base.shape, piece.start, piece.stop):
        buffers = _buffers(stop - start)
        base_B, sum_B = buffers.float32(base_N[start:stop]), buffers.other_B
        # Summed in the thread's buffer: the alignment of the output in memory must not change the last bit.
        torch.mul(base_B, 1.0 if base_weight is None else base_weight, out=sum_B)
        subtracted, sums = as_operand(base_B if base_weight is None else buffers.zero_B), as_operand(sum_B)
        for group, values in zip(groups, values_mG, strict=True):
            operands = buffers.operands(task_vectors, group, start, stop, subtracted)
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
    """Return ⟨Gₛ, τₖ,ₛ⟩ of one piece, [K, m] float64: float32 products, float64 sums of spans and blocks.

    `gradient_N` [N] is the piece's part of G = ∂L/∂θ, and `edges` are those of the tensor's m chunks. τ is formed
    before the product: the difference of ⟨G, θₖ⟩ and ⟨G, θ₀⟩ would cancel.
    """
    groups, base_N = _groups(task_vectors), base.reshape(-1)
    sums_mG = [np.zeros((len(edges) - 1, GROUP)) for _ in groups]
    for start, stop in blocks(base.shape, piece.start, piece.stop):
        buffers = _buffers(stop - start)
        base_B, slope_B = buffers.float32(base_N[start:stop]), buffers.other_B
        slope_B.copy_(gradient_N[start - piece.start : stop - piece.start])
        subtracted, slope = as_operand(base_B), as_operand(slope_B)
        for group, sums in zip(groups, sums_mG, strict=True):
            operands = buffers.operands(task_vectors, group, start, stop, subtracted)
            for chunk, first, last in _chunks_within(edges, start, stop):
                add_inner_products(sums[chunk], slope, *operands, first, last)
    products_Km = np.zeros((len(task_vectors), len(edges) - 1))
    for group, sums in zip(groups, sums_mG, strict=True):
        products_Km[group] = sums.T[: len(group)]
    return products_Km


def mean_magnitudes(base: Tensor, task_vectors: Sequence[TaskVector | None]) -> tuple[float, Array]:
    """Return mean |θ₀| and sₖ = mean |τₖ| [K] of one tensor; blocks are summed in float64.

    The base may be on the meta device if no τ is a difference; its magnitude is then 0.
    """
    base_sum, sums = 0.0, np.zeros(len(task_vectors))
    base_N = base.reshape(-1)
    for start, stop in blocks(base.shape):
        buffers = _buffers(stop - start)
        base_B = buffers.base_B if base.is_meta else buffers.float32(base_N[start:stop])
        if not base.is_meta:
            base_sum += _sum(torch.abs(base_B, out=buffers.other_B))
        for k, task_vector in enumerate(task_vectors):
            if task_vector is not None:
                task_vector.block(start, stop, base_B, buffers.other_B)
                sums[k] += _sum(buffers.other_B.abs_())
    count = max(1, base.numel())
    return base_sum / count, sums / count


def _sum(block_B: Tensor) -> float:
    """Return the sum of a block; in float64, which copies the block, only if float32 overflows.

    numpy adds pairwise with eight partial sums; the partial sums of torch are as many as the CPU's registers hold.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(block_B.numpy().sum())
    return total if math.isfinite(total) else float(block_B.numpy().sum(dtype=np.float64))


def _groups(task_vectors: Sequence[TaskVector | None]) -> list[list[int]]:
    """Return the experts that change the tensor in groups of at most `GROUP`, in order.

    The members of a group have the same `minus_base`, so that one kernel call subtracts the same base from all.
    """
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
    """Return the values [GROUP, m], with zeros for the experts that a smaller group lacks."""
    return np.concatenate([values_Gm, np.zeros((GROUP - len(values_Gm), values_Gm.shape[1]), np.float32)])


def _chunks_within(edges: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield each chunk that overlaps the block: its index, and its first and last element within the block."""
    chunk = bisect_right(edges, start) - 1
    while chunk < len(edges) - 1 and edges[chunk] < stop:
        yield chunk, max(edges[chunk], start) - start, min(edges[chunk + 1], stop) - start
        chunk += 1


@dataclass(frozen=True)
class _Buffers:
    """float32 buffers for one block: the base, a result or gradient, zeros, and one per expert of a group."""

    base_B: Tensor
    other_B: Tensor
    zero_B: Tensor
    expert_GB: tuple[Tensor, ...]

    def float32(self, base_B: Tensor) -> Tensor:
        """Return a block of the base in float32, converted if necessary."""
        return base_B if base_B.dtype == torch.float32 else self.base_B.copy_(base_B)

    def operands(
        self, task_vectors: Sequence[TaskVector | None], group: Sequence[int], start: int, stop: int, base_B: Operand
    ) -> list[Operand]:
        """Return a kernel's inputs: the subtrahend, then `GROUP` operands; a smaller group repeats its last one."""
        members = [task_vector for k in group if (task_vector := task_vectors[k]) is not None]
        operands = [
            member.operand(start, stop, buffer) for member, buffer in zip(members, self.expert_GB, strict=False)
        ]
        subtracted = base_B if members[0].minus_base else as_operand(self.zero_B)
        return [subtracted, *operands, *[operands[-1]] * (GROUP - len(operands))]


def _buffers(count: int) -> _Buffers:
    """Return this thread's buffers for a block of `count` elements."""
    buffers = _threads.buffers
    if buffers is None or buffers.base_B.numel() != count:
        rows_RB = _threads.memory.take((3 + GROUP) * BLOCK).view(3 + GROUP, BLOCK)[:, :count]
        base_B, other_B, zero_B, *expert_GB = rows_RB
        buffers = _threads.buffers = _Buffers(base_B, other_B, zero_B.zero_(), tuple(expert_GB))
    return buffers
