"""Tensors of a file computed one after the other: pieces in their order, several at a time, a bounded number in memory.

While the pieces of one tensor are computed and written, the next tensors are already being prepared. Knows no method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import RunError
from engine.task_vectors import Piece, pieces

Fill = Callable[[Piece, Tensor], None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Job:
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


def stream(jobs: Sequence[Job], pool: Executor, threads: int) -> Iterator[Tensor]:
    """The pieces [N] of all jobs in their order, computed by the `threads` threads of `pool`.

    Raises:
        RunError: a piece that is not finite, named with its tensor.
    """
    # Preparing waits for the pool's threads, so it needs threads of its own; sums must not depend on how many.
    with ThreadPoolExecutor(threads, "prepare", initializer=torch.set_num_threads, initargs=(1,)) as conductors:
        prepared: deque[Future[Fill]] = deque()
        todo = iter(jobs)
        pending: deque[Future[Tensor]] = deque()
        for job in jobs:
            while len(prepared) < threads + 1 and (ahead := next(todo, None)) is not None:
                prepared.append(conductors.submit(ahead.prepare))
            fill = prepared.popleft().result()
            for piece in pieces(job.name, job.shape):
                pending.append(pool.submit(_one, fill, piece, job.dtype))
                while len(pending) > threads:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _one(fill: Fill, piece: Piece, dtype: torch.dtype) -> Tensor:
    out_N = torch.empty(piece.numel, dtype=dtype)
    fill(piece, out_N)
    # A sum is finite only if all are; where it overflows by itself, the elements decide.
    if dtype in FLOATS and not out_N.sum(dtype=torch.float32).isfinite() and not out_N.isfinite().all():
        raise RunError(
            f"the merged tensor has a weight that is NaN or infinite in {str(dtype).removeprefix('torch.')}",
            piece.name,
            do="look at the models' weights, lower the weights, or take a wider `out_dtype`",
        )
    return out_N
