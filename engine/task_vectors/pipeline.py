"""The ordered, bounded pipeline that computes the tensors of an output file piece by piece on several threads.

While the pieces of one tensor are computed and written, the next tensors are prepared.
Letters in tensor names: N elements of a piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import TypeVar

import torch
from torch import Tensor

from engine.errors import RunError
from engine.task_vectors.buffers import ThreadMemory
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.rounding import Rounding, Survival, add_survivals

T = TypeVar("T")
# Computes a piece of a tensor and writes it to a tensor [N]: float32 with a `Rounding`, else the output's dtype.
Fill = Callable[[Piece, Tensor], None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_memory = ThreadMemory()


@dataclass(frozen=True)
class TensorJob:
    """A tensor to compute.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its output dtype.
        prepare: Returns its `Fill`.
        rounding: How a merged tensor is rounded; None for a copy, of which no survival is measured.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    prepare: Callable[[], Fill]
    rounding: Rounding | None = None


@dataclass(frozen=True)
class Copy:
    """The fill that copies a tensor [N], rounding it if the output has another dtype."""

    tensor_N: Tensor

    def __call__(self, piece: Piece, out_N: Tensor) -> None:
        """Copy a piece to `out_N`."""
        out_N.copy_(self.tensor_N[piece.start : piece.stop])

    def has_bits_of(self, dtype: torch.dtype, rounding: Rounding | None) -> bool:
        """Return whether the output is the tensor itself, bit for bit, and so is the base, if there is a rounding."""
        bases = [] if rounding is None else [rounding.base]
        # Tensors that are gathered where they are read, in float32, have no memory of their own.
        stored = all(isinstance(tensor, Tensor) for tensor in (self.tensor_N, *bases))
        return (
            stored
            and self.tensor_N.dtype == dtype
            and all(base.data_ptr() == self.tensor_N.data_ptr() for base in bases)
        )


class SharedMemory:
    """Memory that threads share for work on whole tensors: a thread waits until there is room for what it needs.

    What needs more than all of it goes alone.

    Args:
        nbytes: All of it.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._taken, self._changed = nbytes, 0, Condition()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Return a context in which the thread has so many bytes of it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._nbytes)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


def copy_of(tensor: Tensor) -> Fill:
    """Return a fill that copies `tensor`."""
    return Copy(tensor.reshape(-1))


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    # A finite sum implies finite elements. The sum of finite elements may overflow, so the elements are checked then.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def in_order(calls: Iterable[Callable[[], T]], pool: Executor, ahead: int) -> Iterator[T]:
    """Yield the results of the calls in order; at most `ahead` + 1 calls are submitted to the pool at a time."""
    pending: deque[Future[T]] = deque()
    for call in calls:
        pending.append(pool.submit(call))
        while len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def stream(
    jobs: Sequence[TensorJob], pool: Executor, threads: int, survived: dict[str, Survival] | None = None
) -> Iterator[Tensor]:
    """Yield the pieces [N] of all jobs in order, computed by the `threads` threads of `pool`.

    What rounding leaves of the change of each merged tensor is added to `survived`, by name.

    Raises:
        RunError: a piece has an element that is NaN or infinite; `where` is the tensor's name.
    """
    # A preparation waits for work in `pool`, so it runs in threads of its own. One intra-op thread each: the sums of a
    # preparation must not depend on the number of threads.
    with ThreadPoolExecutor(threads, "prepare", initializer=torch.set_num_threads, initargs=(1,)) as conductors:
        prepared: deque[Future[Fill]] = deque()
        todo = iter(jobs)

        def calls() -> Iterator[Callable[[], tuple[Tensor, dict[str, Survival]]]]:
            for job in jobs:
                while len(prepared) < threads + 1 and (ahead := next(todo, None)) is not None:
                    prepared.append(conductors.submit(ahead.prepare))
                fill = prepared.popleft().result()
                for piece in pieces(job.name, job.shape):
                    yield partial(_computed, fill, piece, job.dtype, job.rounding)

        for out_N, of_piece in in_order(calls(), pool, threads):
            if survived is not None:
                add_survivals(survived, of_piece)
            yield out_N


def _computed(
    fill: Fill, piece: Piece, dtype: torch.dtype, rounding: Rounding | None
) -> tuple[Tensor, dict[str, Survival]]:
    survived: dict[str, Survival] = {}
    if isinstance(fill, Copy) and fill.has_bits_of(dtype, rounding):
        # The file's memory itself, which the writer reads.
        out_N = fill.tensor_N[piece.start : piece.stop]
        survived |= {piece.name: Survival()} if rounding is not None else {}
    elif rounding is None:
        out_N = torch.empty(piece.numel, dtype=dtype)
        fill(piece, out_N)
    else:
        exact_N = torch.empty(piece.numel) if dtype == torch.float32 else _memory.take(piece.numel)
        fill(piece, exact_N)
        out_N, survived[piece.name] = rounding.round(piece, exact_N, dtype)
    if dtype in FLOATS:
        check_merged(piece.name, out_N)
    return out_N, survived


def check_merged(name: str, merged: Tensor) -> None:
    """Check that a merged tensor, or a piece of it, is finite.

    Raises:
        RunError: it is not.
    """
    if not all_finite(merged):
        wider = "" if merged.dtype is torch.float32 else ", or set `out_dtype: float32`"
        raise RunError(
            f"the merged tensor has a NaN or infinite weight in {str(merged.dtype).removeprefix('torch.')}",
            name,
            do=f"check the models' weights, lower `weight`{wider}, and run with --fresh",
        )
