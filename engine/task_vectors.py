"""Streams over the checkpoints: merged tensors from coefficients, coefficient gradients from weight gradients.

All work that grows with the number of experts is here. It goes over a tensor in blocks that fit a core's cache, over
the experts in their order, in float32, with sums of blocks in float64, each tensor by one thread: the result does not
depend on who computes it, nor beside whom. No task vector ever stands whole. Knows no models and no Ray.
Letters: N elements of a flattened tensor, B of a block, K experts, m chunks of the tensor.
Source: Expert Merging, arXiv 2509.25712, θₗ = θ₀,ₗ + Σₖ Σₛ αₖ,ₗ,ₛ · τₖ,ₗ,ₛ and its chain rule.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, Expert, TaskVector
from engine.coefficients import Coefficients, Layout, TensorCoefficients
from engine.errors import CheckpointError

Array = npt.NDArray[np.float64]

# Elements of a block at most: base, one expert's difference and the result are 3 MiB in float32, which stays in a
# core's cache. Each thread keeps its three for good: fresh memory would cost more than the sums.
BLOCK = 1 << 18
_scratch = threading.local()


class Shards(Protocol):
    """What a trainer asks of the task vectors, wherever they are."""

    def merge(self, coefficients: Coefficients, put: Callable[[str, Tensor], None]) -> None:
        """Compute every merged tensor in the run's dtype and give each to `put`, which copies it."""

    def gradients(self, layout: Layout, take: Callable[[str], Tensor]) -> Array:
        """∂L/∂α [K, C] from ∂L/∂θ, which `take` gives up tensor by tensor; C are the layout's columns."""

    def traffic(self) -> dict[str, int]:
        """Bytes of weight gradients sent out and of merged tensors received, so far."""


@dataclass(frozen=True)
class Inspection:
    """What a first reading of one tensor tells: sₖ = mean |τₖ| of each expert, [K]."""

    magnitudes: Array


class TaskVectors:
    """The base and K experts as streams; `threads` tensors at a time."""

    def __init__(
        self, base: Checkpoint, experts: Sequence[tuple[str, Expert]], dtype: torch.dtype, threads: int
    ) -> None:
        self.base, self.experts, self.dtype = base, experts, dtype
        # One thread a tensor, and none inside an operation: sums must not depend on how many threads there are.
        self._pool = ThreadPoolExecutor(threads, "task-vectors", initializer=torch.set_num_threads, initargs=(1,))

    def merge(
        self, coefficients: Mapping[str, TensorCoefficients], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The merged tensors θₗ of the given names, in `dtype` (the run's if None), shaped as the base's."""

        def one(name: str, wanted: TensorCoefficients) -> Tensor:
            return merge_tensor(self.base.read(name), self._task_vectors(name), wanted, dtype or self.dtype)

        return dict(zip(coefficients, self._pool.map(one, coefficients, coefficients.values()), strict=True))

    def gradients(
        self, edges: Mapping[str, tuple[int, ...]], weight_gradients: Mapping[str, Tensor]
    ) -> dict[str, Array]:
        """∂L/∂αₖ,ₗ,ₛ = ⟨Gₗ,ₛ, τₖ,ₗ,ₛ⟩ of the given tensors, each [K, m]."""

        def one(name: str) -> Array:
            return inner_products(weight_gradients[name], self.base.read(name), self._task_vectors(name), edges[name])

        return dict(zip(edges, self._pool.map(one, edges), strict=True))

    def inspect(self, names: Iterable[str]) -> dict[str, Inspection]:
        """Read the given tensors of base and experts once.

        Raises:
            CheckpointError: a weight that is NaN or infinite, named with its tensor and model.
        """
        names = list(names)
        return dict(zip(names, self._pool.map(self._inspect, names), strict=True))

    def _inspect(self, name: str) -> Inspection:
        base = self.base.read(name)
        if not base.is_floating_point():
            return Inspection(np.zeros(len(self.experts)))
        base_magnitude, magnitudes = mean_magnitudes(base, self._task_vectors(name))
        owners = ["the base", *(f"expert {model!r}" for model, _ in self.experts)]
        for owner, magnitude in zip(owners, [base_magnitude, *magnitudes], strict=True):
            # A sum of absolute values is finite only if all of them are, so the check costs no reading of its own.
            if not np.isfinite(magnitude):
                raise CheckpointError(f"the tensor {name!r} has a weight that is NaN or infinite", owner)
        return Inspection(magnitudes)

    def _task_vectors(self, name: str) -> list[TaskVector | None]:
        return [expert.task_vector(name) for _, expert in self.experts]


class LocalShards:
    """Task vectors in the caller's own process, behind the interface that a trainer uses."""

    def __init__(self, task_vectors: TaskVectors) -> None:
        self._task_vectors = task_vectors

    def merge(self, coefficients: Coefficients, put: Callable[[str, Tensor], None]) -> None:
        """See `Shards.merge`."""
        for name in coefficients.layout.tensors:
            put(name, self._task_vectors.merge({name: coefficients.of(name)})[name])

    def gradients(self, layout: Layout, take: Callable[[str], Tensor]) -> Array:
        """See `Shards.gradients`."""
        parts = [
            self._task_vectors.gradients({name: edges}, {name: take(name)})[name]
            for name, edges in layout.edges_of.items()
        ]
        return np.concatenate(parts, axis=1)

    def traffic(self) -> dict[str, int]:
        """See `Shards.traffic`: nothing leaves the process."""
        return {"bytes_to_shards": 0, "bytes_from_shards": 0}


def merge_tensor(
    base: Tensor, task_vectors: Sequence[TaskVector | None], wanted: TensorCoefficients, dtype: torch.dtype
) -> Tensor:
    """θ = θ₀ + Σₖ Σₛ αₖ,ₛ · τₖ,ₛ of one tensor, shaped as the base; a float32 sum over k, rounded once to `dtype`."""
    merged, base_N = torch.empty(base.shape, dtype=dtype), base.reshape(-1)
    merged_N = merged.view(-1)
    base_B, tau_B, sum_B = _buffers()
    for start, stop in blocks(base.shape):
        block, tau, total = (buffer[: stop - start] for buffer in (base_B, tau_B, sum_B))
        block.copy_(base_N[start:stop])
        total.copy_(block)
        for k, task_vector in enumerate(task_vectors):
            if task_vector is not None:
                task_vector.block(start, stop, block, tau)
                for chunk, first, last in _chunks_within(wanted.edges, start, stop):
                    total[first:last].add_(tau[first:last], alpha=float(wanted.values[k, chunk]))
        merged_N[start:stop].copy_(total)
    return merged


def inner_products(
    gradient: Tensor, base: Tensor, task_vectors: Sequence[TaskVector | None], edges: tuple[int, ...]
) -> Array:
    """⟨Gₛ, τₖ,ₛ⟩ of one tensor, [K, m]: products in float32, sums of blocks in float64.

    τ is formed before the product: the difference of ⟨G, θₖ⟩ and ⟨G, θ₀⟩ would cancel.
    """
    products = np.zeros((len(task_vectors), len(edges) - 1))
    gradient_N, base_N = gradient.reshape(-1), base.reshape(-1)
    base_B, tau_B, gradient_B = _buffers()
    for start, stop in blocks(base.shape):
        block, tau, slope = (buffer[: stop - start] for buffer in (base_B, tau_B, gradient_B))
        block.copy_(base_N[start:stop])
        slope.copy_(gradient_N[start:stop])
        for k, task_vector in enumerate(task_vectors):
            if task_vector is not None:
                task_vector.block(start, stop, block, tau)
                for chunk, first, last in _chunks_within(edges, start, stop):
                    products[k, chunk] += torch.dot(slope[first:last], tau[first:last]).item()
    return products


def mean_magnitudes(base: Tensor, task_vectors: Sequence[TaskVector | None]) -> tuple[float, Array]:
    """mean |θ₀| and sₖ = mean |τₖ| [K] of one tensor, summed in float64."""
    base_sum, sums = 0.0, np.zeros(len(task_vectors))
    base_N = base.reshape(-1)
    base_B, tau_B, magnitude_B = _buffers()
    for start, stop in blocks(base.shape):
        block, tau = base_B[: stop - start], tau_B[: stop - start]
        block.copy_(base_N[start:stop])
        base_sum += torch.abs(block, out=magnitude_B[: stop - start]).sum(dtype=torch.float64).item()
        for k, task_vector in enumerate(task_vectors):
            if task_vector is not None:
                task_vector.block(start, stop, block, tau)
                sums[k] += tau.abs_().sum(dtype=torch.float64).item()
    count = max(1, base.numel())
    return base_sum / count, sums / count


def blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where the blocks of a flattened tensor begin and end: whole rows of the last dimension where they fit a block."""
    numel = math.prod(shape)
    row = shape[-1] if shape else 1
    size = BLOCK // row * row if 0 < row <= BLOCK else BLOCK
    return ((start, min(start + size, numel)) for start in range(0, numel, size))


def _chunks_within(edges: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The chunks that a block meets: number, first and last element as places in the block."""
    chunk = bisect_right(edges, start) - 1
    while chunk < len(edges) - 1 and edges[chunk] < stop:
        yield chunk, max(edges[chunk], start) - start, min(edges[chunk + 1], stop) - start
        chunk += 1


def _buffers() -> tuple[Tensor, Tensor, Tensor]:
    """This thread's three blocks of float32."""
    if not hasattr(_scratch, "buffers"):
        _scratch.buffers = tuple(torch.empty(BLOCK) for _ in range(3))
    buffers: tuple[Tensor, Tensor, Tensor] = _scratch.buffers
    return buffers
