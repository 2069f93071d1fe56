"""Tensors of a file computed one after the other: pieces in their order, several at a time, a bounded number in memory.

While the pieces of one tensor are computed and written, the next tensors are already being prepared. Knows no method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from engine.errors import RunError
from engine.task_vectors.pieces import Piece, pieces

T = TypeVar("T")


Fill = Callable[[Piece, Tensor], None]


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorJob:
    """A tensor to compute: its shape, the dtype to write it in, and what prepares the filling of its pieces."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    prepare: Callable[[], Fill]


def copy_of(tensor: Tensor) -> Fill:
    """Pieces of a tensor as it is, or rounded to another dtype."""
    tensor_N = tensor.reshape(-1)

    def fill(piece: Piece, out_N: Tensor) -> None:
        out_N.copy_(tensor_N[piece.start : piece.stop])

    return fill


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is finite only if all are; where it overflows by itself, the elements decide.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def in_order(calls: Iterable[Callable[[], T]], pool: Executor, ahead: int) -> Iterator[T]:
    """What the calls return, in their order; `ahead` of them, and one, are with the pool at a time."""
    pending: deque[Future[T]] = deque()
    for call in calls:
        pending.append(pool.submit(call))
        while len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def stream(jobs: Sequence[TensorJob], pool: Executor, threads: int) -> Iterator[Tensor]:
    """The pieces [N] of all jobs in their order, computed by the `threads` threads of `pool`.

    Raises:
        RunError: a piece that is not finite, named with its tensor.
    """
    # Preparing waits for the pool's threads, so it needs threads of its own; sums must not depend on how many.
    with ThreadPoolExecutor(threads, "prepare", initializer=torch.set_num_threads, initargs=(1,)) as conductors:
        prepared: deque[Future[Fill]] = deque()
        todo = iter(jobs)

        def calls() -> Iterator[Callable[[], Tensor]]:
            for job in jobs:
                while len(prepared) < threads + 1 and (ahead := next(todo, None)) is not None:
                    prepared.append(conductors.submit(ahead.prepare))
                fill = prepared.popleft().result()
                for piece in pieces(job.name, job.shape):
                    yield partial(_one, fill, piece, job.dtype)

        yield from in_order(calls(), pool, threads)


def _one(fill: Fill, piece: Piece, dtype: torch.dtype) -> Tensor:
    out_N = torch.empty(piece.numel, dtype=dtype)
    fill(piece, out_N)
    if dtype in FLOATS and not all_finite(out_N):
        raise RunError(
            f"the merged tensor has a weight that is NaN or infinite in {str(dtype).removeprefix('torch.')}",
            piece.name,
            do="look at the models' weights, lower the weights, or take a wider `out_dtype`",
        )
    return out_N
