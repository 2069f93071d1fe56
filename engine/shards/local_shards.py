"""Shards in the trainer's own process. `cluster/remote_shards.py` implements the same protocol with shard actors.

With overlap, merged pieces arrive while the model already computes with earlier ones, and gradients are sent while
others are still being computed. The number of bytes in flight is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import Future, wait
from functools import cached_property

from torch import Tensor

from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan, in_order_of_use
from engine.shards.orthogonal import with_orthogonal
from engine.shards.protocol import Arrivals, Gradients, PieceSink, coefficient_gradient
from engine.sizes import WINDOW_BYTES
from engine.storage.folder import Folder
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.streams import TaskVectors
from engine.transfers import Fetch, to_cpu


class LocalShards:
    """The `Shards` of a trainer that streams the task vectors itself, without any transfer.

    Args:
        plan: The plan.
        threads: Number of threads of the streams.
        overlap: Run the streams while the model computes, for a model on a GPU. Without overlap, model and streams take
            turns: on the same cores they slow each other down (twice the time, measured).
        state: The folder of the run's state; needed for orthogonal task vectors.
        names: The tensors that are merged here. None: all merged tensors.
    """

    def __init__(
        self,
        plan: Plan,
        threads: int,
        overlap: bool,
        state: Folder | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        self._plan, self._threads, self._overlap, self._state = plan, threads, overlap, state
        self._names = in_order_of_use(plan.merged if names is None else names)

    def merge(self, coefficients: Coefficients, model: PieceSink) -> Arrivals:
        """See `Shards.merge`."""
        streams = self._task_vectors

        def merge_into_model(piece: Piece) -> None:
            buffer_N = model.buffer(piece)
            try:
                streams.merge(piece, coefficients.of(piece.name), buffer_N)
            finally:
                # Also after an error, which the future raises: others may wait for the buffer.
                model.put(piece, buffer_N)

        arrivals = {
            name: [
                streams.pool.submit(merge_into_model, piece) for piece in pieces(name, streams.base.tensors[name].shape)
            ]
            for name in self._names
        }
        if not self._overlap:
            wait(arrival for arriving in arrivals.values() for arrival in arriving)
        return arrivals

    def gradients(self, layout: ChunkLayout) -> Gradients:
        """See `Shards.gradients`."""
        return _LocalGradients(self._task_vectors, layout, self._overlap)

    def traffic(self) -> dict[str, int]:
        """See `Shards.traffic`."""
        return {"bytes_to_shards": 0, "bytes_from_shards": 0}

    @cached_property
    def _task_vectors(self) -> TaskVectors:
        # Opened at the first call: an error of a call reaches the driver unchanged, one of a constructor does not.
        return with_orthogonal(self._plan, open_task_vectors(self._plan, self._threads), self._state)


class _LocalGradients:
    def __init__(self, task_vectors: TaskVectors, layout: ChunkLayout, overlap: bool) -> None:
        self._streams, self._layout, self._overlap = task_vectors, layout, overlap
        self._parts: list[tuple[str, Future[Array]]] = []
        self._held: list[tuple[str, Fetch]] = []
        self._bytes = 0
        # The backward pass of a model on several GPUs sends from a thread of each.
        self._lock = threading.Lock()

    def send(self, name: str, gradient: Tensor) -> None:
        with self._lock:
            if self._bytes and self._bytes + gradient.nbytes > WINDOW_BYTES:
                self._finish()
            self._bytes += gradient.nbytes
            self._held.append((name, to_cpu(gradient)))
            if self._overlap:
                self._start()

    def collect(self) -> Array:
        self._finish()
        parts = ((name, future.result()) for name, future in self._parts)
        return coefficient_gradient(self._layout, len(self._streams.experts), parts)

    def _start(self) -> None:
        for name, fetch in self._held:
            for piece in pieces(name, self._streams.base.tensors[name].shape):
                self._parts.append((name, self._streams.pool.submit(self._gradient, piece, fetch)))
        self._held.clear()

    def _finish(self) -> None:
        self._start()
        wait(future for _, future in self._parts)
        self._bytes = 0

    def _gradient(self, piece: Piece, fetch: Fetch) -> Array:
        with fetch(piece.start, piece.stop) as gradient_N:
            return self._streams.gradients(piece, gradient_N, self._layout.edges_of[piece.name])
