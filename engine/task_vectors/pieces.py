"""A part of the house that has no words of its own yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.sizes import BLOCK, PIECE


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
