"""What a trainer asks of the task vectors, wherever they are, and the way to ask those of its own process.

Merged pieces arrive while the model is already computing with others; gradients leave while it still computes others; a
bounded number of bytes is under way. Knows no Ray: `cluster/exchange.py` asks shards of other processes the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.coefficients import Coefficients, Layout
from engine.orthogonal import with_orthogonal
from engine.plan import Plan, in_order_of_use
from engine.sizes import WINDOW_BYTES
from engine.storage import Folder
from engine.task_vectors import Piece, TaskVectors, open_task_vectors, pieces

Array = npt.NDArray[np.float64]

# Tensor name → what is done when all of the tensor's merged pieces are in the model.
Arrivals = Mapping[str, Sequence["Future[None]"]]


class Model(Protocol):
    """Where merged pieces go."""

    def room(self, piece: Piece) -> Tensor:
        """CPU memory [piece.numel] in the run's dtype to write the merged piece to."""

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """Take what was written to the piece's room."""


class Shards(Protocol):
    """The task vectors as a trainer sees them."""

    def merge(self, coefficients: Coefficients, model: Model) -> Arrivals:
        """Begin to compute every merged tensor and to put it into the model, first what the model needs first."""

    def gradients(self, layout: Layout) -> Gradients:
        """Begin to take weight gradients."""

    def traffic(self) -> dict[str, int]:
        """Bytes of weight gradients sent out and of merged tensors received, so far."""


class Gradients(Protocol):
    """Weight gradients on their way out, coefficient gradients on their way back."""

    def send(self, name: str, fetch: Callable[[], Tensor], nbytes: int) -> None:
        """Let the gradient of a whole tensor leave; `fetch` gives it on the CPU, from whatever thread.

        Returns when there is room for it, which need not be when it has left. A tensor may leave more than once: what
        counts is the sum.
        """

    def collect(self) -> Array:
        """∂L/∂α [K, C] of all that was sent; C are the layout's columns."""


class Window:
    """At most `limit` bytes under way, or one thing that is larger."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    def enter(self, nbytes: int) -> None:
        """Wait until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes

    def leave(self, nbytes: int) -> None:
        """Make room."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()


def coefficient_gradient(layout: Layout, experts: int, parts: Iterable[tuple[str, Array]]) -> Array:
    """∂L/∂α [K, C] from what each piece of each weight gradient gives, (tensor name, [K, m]), zero where nothing does.

    Float64; the parts of a tensor are added in their order, so that the sum is the same every time.
    """
    gradient = np.zeros((experts, layout.width))
    columns = layout.columns
    for name, part in parts:
        gradient[:, columns[name]] += part
    return gradient


class LocalShards:
    """Task vectors in the trainer's own process: nothing travels.

    With `overlap` they are at work while the model computes, as is right where it computes on a GPU. Without, model and
    task vectors take turns: on the same cores each would only be in the other's way (twice the time, measured).
    """

    def __init__(self, plan: Plan, threads: int, overlap: bool, state: Folder | None = None) -> None:
        self._plan, self._threads, self._overlap, self._state = plan, threads, overlap, state

    def merge(self, coefficients: Coefficients, model: Model) -> Arrivals:
        """See `Shards.merge`."""
        streams = self._task_vectors

        def one(piece: Piece) -> None:
            room = model.room(piece)
            streams.merge(piece, coefficients.of(piece.name), room)
            model.put(piece, room)

        arrivals = {
            name: [streams.pool.submit(one, piece) for piece in pieces(name, streams.base.tensors[name].shape)]
            for name in in_order_of_use(coefficients.layout.tensors)
        }
        if not self._overlap:
            wait(arrival for arriving in arrivals.values() for arrival in arriving)
        return arrivals

    def gradients(self, layout: Layout) -> Gradients:
        """See `Shards.gradients`."""
        return _LocalGradients(self._task_vectors, layout, self._overlap)

    def traffic(self) -> dict[str, int]:
        """See `Shards.traffic`."""
        return {"bytes_to_shards": 0, "bytes_from_shards": 0}

    @cached_property
    def _task_vectors(self) -> TaskVectors:
        # Opened at the first call, not at the start: what a call raises reaches the driver as it is.
        return with_orthogonal(self._plan, open_task_vectors(self._plan, self._threads), self._state)


class _LocalGradients:
    def __init__(self, task_vectors: TaskVectors, layout: Layout, overlap: bool) -> None:
        self._streams, self._layout, self._overlap = task_vectors, layout, overlap
        self._parts: list[tuple[str, Future[Array]]] = []
        self._held: list[tuple[str, Callable[[], Tensor]]] = []
        self._bytes = 0

    def send(self, name: str, fetch: Callable[[], Tensor], nbytes: int) -> None:
        if self._bytes and self._bytes + nbytes > WINDOW_BYTES:
            self._finish()
        self._bytes += nbytes
        self._held.append((name, fetch))
        if self._overlap:
            self._start()

    def collect(self) -> Array:
        self._finish()
        parts = ((name, future.result()) for name, future in self._parts)
        return coefficient_gradient(self._layout, len(self._streams.experts), parts)

    def _start(self) -> None:
        for name, fetch in self._held:
            for piece in pieces(name, self._streams.base.tensors[name].shape):
                self._parts.append((name, self._streams.pool.submit(self._one, piece, fetch)))
        self._held.clear()

    def _finish(self) -> None:
        self._start()
        wait(future for _, future in self._parts)
        self._bytes = 0

    def _one(self, piece: Piece, fetch: Callable[[], Tensor]) -> Array:
        gradient_N = fetch().reshape(-1)[piece.start : piece.stop]
        return self._streams.gradients(piece, gradient_N, self._layout.edges_of[piece.name])
