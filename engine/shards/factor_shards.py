"""Shards by factors of the task vectors, on the trainer's own device: nothing moves in a step, whatever K is.

Matrices have factors if they are orthogonal task vectors stored as such, or if their task vectors are those of adapters
(`engine.planning.factors`). All other tensors are left to other shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.planning.factors import decomposed, ranks
from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan, in_order_of_use
from engine.shards.orthogonal import StoredTaskVectors
from engine.shards.protocol import Arrivals, Gradients, PieceSink, Shards
from engine.storage.folder import Folder
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients
from engine.task_vectors.factors import Factors, merge_factors, project, project_directions, sum_directions
from engine.task_vectors.kinds import Product
from engine.task_vectors.streams import TaskVectors
from engine.transfers import DoubleBuffer


class FactorShards:
    """The `Shards` of a trainer that merges matrices by products with factors.

    On a GPU, base and factors are copied to the device at their first use and stay there, as far as `room` reaches;
    the others are in pinned memory and are copied for each use, while the product of the matrix before is computed. On
    a CPU they are views of files.

    Args:
        plan: The plan.
        names: The matrices that are merged here.
        rest: Merges all other tensors.
        state: The folder of the run's state; needed for stored task vectors.
        room: Bytes of a GPU's memory that must stay free for the rest of a step.
    """

    def __init__(
        self, plan: Plan, names: Sequence[str], rest: Shards, state: Folder | None = None, room: float = 0
    ) -> None:
        self._plan, self._names, self._rest, self._state, self.room = plan, names, rest, state, room
        self._held: dict[str, tuple[Tensor, Factors]] = {}
        # By device: the matrices in pinned memory in the order of use, and the places for them.
        self._pinned: dict[torch.device, list[str]] = {}
        self._buffers: dict[torch.device, DoubleBuffer] = {}

    def merge(self, coefficients: Coefficients, model: PieceSink) -> Arrivals:
        """See `Shards.merge`. Matrices with factors are merged, or on a GPU queued, when the call returns."""
        arrivals = self._rest.merge(coefficients, model)
        for name in in_order_of_use(self._names):
            whole = model.whole(name)
            base, factors = self.on(whole.device, name, following=1)
            merge_factors(base, factors, coefficients.of(name), whole)
        return arrivals

    def gradients(self, layout: ChunkLayout) -> Gradients:
        """See `Shards.gradients`."""
        return _FactorGradients(self, layout, self._rest.gradients(layout), frozenset(self._names))

    def traffic(self) -> dict[str, int]:
        """See `Shards.traffic`."""
        return self._rest.traffic()

    def on(self, device: torch.device, name: str, following: int = 0) -> tuple[Tensor, Factors]:
        """Return the base's matrix and the factors on a device, in the dtype of the computation.

        This is float32 on a CPU and for stored float32; a GPU multiplies bfloat16 with sums in float32. On a GPU they
        are for work that is queued before the next call; `following`: 1 if matrices are wanted in the order of use, -1
        if in the reverse order.
        """
        base, factors = self._held.get(name) or self._load(name)
        if device.type == "cpu":
            return base.float(), factors.to(device, torch.float32)
        dtype = torch.float32 if self._plan.dtype == "float16" else getattr(torch, self._plan.dtype)
        if name not in self._held:
            self._hold(device, name, base.to(dtype), factors.to(base.device, dtype))
        waiting = self._pinned.get(device, [])
        if name not in waiting:
            return self._held[name]
        place = waiting.index(name) + following
        ahead = waiting[place] if 0 <= place < len(waiting) else name
        base, left_mR, right_Rn = self._buffers[device].get(name, self._group(name), (ahead, self._group(ahead)))
        return base, Factors(left_mR, right_Rn, factors.ranks)

    def _hold(self, device: torch.device, name: str, base: Tensor, factors: Factors) -> None:
        """Copy a matrix's base and factors to the device or, if it lacks the room, to pinned memory."""
        free, _ = torch.cuda.mem_get_info(device)
        nbytes, item = base.nbytes + factors.left_mR.nbytes + factors.right_Rn.nbytes, base.element_size()
        place = max(DoubleBuffer.nbytes(item * count for count in counts) for counts in self._elements.values())
        if free - nbytes >= self.room + (0 if device in self._buffers else 2 * place):
            self._held[name] = base.to(device), factors.to(device, base.dtype)
            return
        if device not in self._buffers:
            self._buffers[device] = DoubleBuffer(device, place)
        pinned = Factors(factors.left_mR.pin_memory(), factors.right_Rn.pin_memory(), factors.ranks)
        self._held[name] = base.pin_memory(), pinned
        self._pinned.setdefault(device, []).append(name)

    def _group(self, name: str) -> tuple[Tensor, ...]:
        base, factors = self._held[name]
        return base, factors.left_mR, factors.right_Rn

    def _load(self, name: str) -> tuple[Tensor, Factors]:
        """Return the base's matrix as a view of its file, and the factors in the dtype in which they are stored."""
        base = self._task_vectors.base.read(name)
        if name in self._decomposed:
            return base, self._stored.factors(name)
        products: list[Product | None] = []
        for task_vector in self._task_vectors.of(name):
            assert task_vector is None or isinstance(task_vector, Product)
            products.append(task_vector)
        return base, Factors.of(products, base.shape)

    @cached_property
    def _elements(self) -> dict[str, list[int]]:
        """The most elements of each matrix's base and factors."""
        found = {}
        for name in self._names:
            (rows, columns), rank = self._plan.base_header.tensors[name].shape, sum(ranks(self._plan, name))
            found[name] = [rows * columns, rows * rank, rank * columns]
        return found

    @cached_property
    def _task_vectors(self) -> TaskVectors:
        # Opened at the first call: an error of a call reaches the driver unchanged, one of a constructor does not.
        return open_task_vectors(self._plan, 1)

    @cached_property
    def _decomposed(self) -> frozenset[str]:
        return frozenset(decomposed(self._plan))

    @cached_property
    def _stored(self) -> StoredTaskVectors:
        assert self._state is not None
        return StoredTaskVectors(self._state)


class _FactorGradients:
    """The sums ⟨Gₛ, τₖ,ₛ⟩ of each matrix, [K, S] float64 on the device of its gradient.

    Where chunks are groups of singular directions, it is ⟨G, τᵣ⟩ of each direction, [R].
    """

    def __init__(self, shards: FactorShards, layout: ChunkLayout, rest: Gradients, names: frozenset[str]) -> None:
        self._shards, self._layout, self._rest, self._names = shards, layout, rest, names
        self._sums: dict[str, Tensor] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}

    def send(self, name: str, gradient: Tensor) -> None:
        if name not in self._names:
            self._rest.send(name, gradient)
            return
        base, factors = self._shards.on(gradient.device, name, following=-1)
        self._ranks[name], slope = factors.ranks, gradient.to(base.dtype)
        if name in self._layout.spectral:
            part = project_directions(slope, factors)
        else:
            part = project(slope, factors, self._layout.edges_of[name])
        # In the order of the passes, whichever thread of the backward pass calls.
        self._sums[name] = self._sums[name] + part if name in self._sums else part

    def collect(self) -> Array:
        gradient = self._rest.collect()
        columns = self._layout.columns
        for name, sums in self._read().items():
            if name in self._layout.spectral:
                sums = sum_directions(sums, self._ranks[name], self._layout.edges_of[name])
            gradient[:, columns[name]] = sums
        return np.asarray(gradient)

    def _read(self) -> dict[str, Array]:
        """Return the sums of each matrix, waiting once for each GPU."""
        found: dict[str, Array] = {}
        on = defaultdict[torch.device, list[str]](list)
        for name, sums in self._sums.items():
            on[sums.device].append(name)
        for names in on.values():
            numbers = torch.cat([self._sums[name].flatten() for name in names]).cpu().numpy()
            ends = np.cumsum([self._sums[name].numel() for name in names])[:-1]
            parts = zip(names, np.split(numbers, ends), strict=True)
            found |= {name: part.reshape(self._sums[name].shape) for name, part in parts}
        return found
