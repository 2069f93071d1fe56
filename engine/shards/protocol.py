"""A part of the house that has no words of its own yet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from torch import Tensor

from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece

# Tensor name → what is done when all of the tensor's merged pieces are in the model.
Arrivals = Mapping[str, Sequence["Future[None]"]]


class PieceSink(Protocol):
    """Where merged pieces go."""

    def buffer(self, piece: Piece) -> Tensor:
        """CPU memory [piece.numel] in the run's dtype to write the merged piece to."""

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """Take what was written to the piece's room."""


class Shards(Protocol):
    """The task vectors as a trainer sees them."""

    def merge(self, coefficients: Coefficients, model: PieceSink) -> Arrivals:
        """Begin to compute every merged tensor and to put it into the model, first what the model needs first."""

    def gradients(self, layout: ChunkLayout) -> Gradients:
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


class InFlightLimit:
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


def coefficient_gradient(layout: ChunkLayout, experts: int, parts: Iterable[tuple[str, Array]]) -> Array:
    """∂L/∂α [K, C] from what each piece of each weight gradient gives, (tensor name, [K, m]), zero where nothing does.

    Float64; the parts of a tensor are added in their order, so that the sum is the same every time.
    """
    gradient = np.zeros((experts, layout.width))
    columns = layout.columns
    for name, part in parts:
        gradient[:, columns[name]] += part
    return gradient
