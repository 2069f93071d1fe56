"""The division of a flattened tensor into pieces (one thread's unit of work) and blocks (which fit a core's cache)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.sizes import BLOCK, PIECE


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` (exclusive) of the flattened tensor `name`."""

    name: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def pieces(name: str, shape: Sequence[int]) -> Iterator[Piece]:
    """Yield the pieces of a tensor.

    A piece consists of whole blocks, so that the order of additions depends on the tensor's shape alone.
    """
    numel, block = math.prod(shape), _block_size(shape)
    size = max(1, PIECE // block) * block
    return (Piece(name, start, min(start + size, numel)) for start in range(0, numel, size))


def blocks(shape: Sequence[int], start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield first and last element (exclusive) of each block of a flattened tensor, between `start` and `stop`."""
    stop, size = math.prod(shape) if stop is None else stop, _block_size(shape)
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def _block_size(shape: Sequence[int]) -> int:
    """Return the elements of a block: whole rows of the last dimension if one fits.

    A product of two factors then computes only the rows of the block.
    """
    row = shape[-1] if shape else 1
    return BLOCK // row * row if 0 < row <= BLOCK else BLOCK
