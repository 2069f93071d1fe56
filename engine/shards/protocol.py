"""The interface between the trainer and the shards: protocols, the limit on bytes in flight, the sum of gradients.

Letters: N elements of a piece, K experts, C coefficients of one expert, m chunks of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from torch import Tensor

from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece

# Tensor name → one future per piece, done when the merged piece is in the model.
Arrivals = Mapping[str, Sequence["Future[None]"]]


class PieceSink(Protocol):
    """The receiver of merged pieces, such as the trainer's model."""

    def buffer(self, piece: Piece) -> Tensor:
        """Return CPU memory [N] in the run's dtype for the merged piece."""

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """Accept the merged piece [N]; the buffer it was written to may be used again."""

    def whole(self, name: str) -> Tensor:
        """Return the memory of a whole merged tensor, on its device and in the run's dtype, in the tensor's shape."""


class Shards(Protocol):
    """The task vectors as the trainer uses them."""

    def merge(self, coefficients: Coefficients, model: PieceSink) -> Arrivals:
        """Start to merge every tensor and to put its pieces into `model`, in the order in which the model uses them.

        Returns:
            One future per piece, by tensor name. A future raises the error of its piece.
        """

    def gradients(self, layout: ChunkLayout) -> Gradients:
        """Start a collection of weight gradients; see `Gradients`."""

    def traffic(self) -> dict[str, int]:
        """Return the bytes of weight gradients sent and of merged tensors received so far."""


class Gradients(Protocol):
    """A collection in progress: weight gradients are sent, coefficient gradients collected."""

    def send(self, name: str, gradient: Tensor) -> None:
        """Send the gradient of a whole tensor, in the tensor's shape and on its device.

        The call blocks until the limit on bytes in flight admits the gradient, and may return before it is sent. A
        tensor may be sent several times; the gradients add up.
        """

    def collect(self) -> Array:
        """Wait for all gradients sent and return ∂L/∂α [K, C], float64, in the layout's columns."""


class InFlightLimit:
    """A limit on bytes in flight: at most `limit` bytes, or a single larger item."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    def enter(self, nbytes: int) -> None:
        """Wait until `nbytes` more are admitted, and count them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes

    def leave(self, nbytes: int) -> None:
        """Release `nbytes`."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()


def coefficient_gradient(layout: ChunkLayout, experts: int, parts: Iterable[tuple[str, Array]]) -> Array:
    """Return ∂L/∂α [K, C], float64, from parts (tensor name, [K, m]); columns without a part are zero.

    The parts of a tensor are added in the order of `parts`, which makes the sum reproducible.
    """
    gradient = np.zeros((experts, layout.width))
    columns = layout.columns
    for name, part in parts:
        gradient[:, columns[name]] += part
    return gradient
