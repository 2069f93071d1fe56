"""Copies between the CPU and GPUs: on a stream of their own, through pinned buffers that are used again and again.

A copy on the stream of the computation would wait for it, and the computation for the copy. Here, events say what waits
for what. Pinning memory takes longer than a copy, so buffers are pinned once; their number bounds the pinned memory.
Letter: N elements of a tensor or of a range of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.machine import usable_cpus
from engine.sizes import PIECE

# Reads elements start to stop of a tensor on the CPU.
Fetch = Callable[[int, int], AbstractContextManager[Tensor]]

_streams: dict[torch.device, Any] = {}
_lock = threading.Lock()


class Ring:
    """At most `count` pinned buffers of `nbytes` bytes, which their holders use in turn. Any thread may use it."""

    def __init__(self, count: int, nbytes: int) -> None:
        self._count, self._nbytes, self._made = count, nbytes, 0
        # Buffers without a holder, each with the event of the last copy from it, in the order of these copies.
        self._free: deque[tuple[Tensor, Any]] = deque()
        self._held: dict[int, Tensor] = {}
        self._changed = threading.Condition()

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer [N], which must be given back; waits until one is free and all copies from it are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._made < self._count)
            if self._made < self._count and not (self._free and _is_done(self._free[0][1])):
                buffer, copied = pinned(self._nbytes), None
                self._made += 1
            else:
                buffer, copied = self._free.popleft()
            self._held[buffer.data_ptr()] = buffer
        if copied is not None:
            copied.synchronize()
        return buffer[: numel * dtype.itemsize].view(dtype)

    def give(self, buffer_N: Tensor, copied: Any = None) -> None:
        """Give a buffer back. Its next holder waits for the event `copied`, that of the last copy from it."""
        with self._changed:
            self._free.append((self._held.pop(buffer_N.untyped_storage().data_ptr()), copied))
            self._changed.notify()


# Bytes of a buffer: those of a piece. There is one for each thread that merges pieces, and some for copies under way.
BUFFER = 4 * PIECE
RING = Ring(usable_cpus() + 4, BUFFER)


def on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is in a GPU's memory."""
    return tensor.is_cuda


def is_gpu(device: torch.device) -> bool:
    """Return whether a device is a GPU."""
    return device.type == "cuda"


def pinned(nbytes: int) -> Tensor:
    """Return new pinned memory, uint8."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def computed(device: torch.device) -> Any:
    """Return an event that happens when all work is done that is on the current stream of a GPU now."""
    # A thread that waits for a blocking event leaves its core.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def start_copy(target: Tensor, source: Tensor, after: Any = None) -> Any:
    """Start a copy between a GPU and pinned memory, once the event `after` has happened, and return its own event.

    Both tensors must stay in memory until then.
    """
    stream = _stream(target.device if on_gpu(target) else source.device)
    with torch.cuda.stream(stream):
        if after is not None:
            stream.wait_event(after)
        copy(target, source)
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(stream)
    return copied


def copy(target: Tensor, source: Tensor) -> None:
    """Queue a copy on the current stream."""
    target.copy_(source, non_blocking=True)


def to_gpu(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a GPU, rounded to `dtype` if one is given, when it is there.

    Any thread may call it, and others compute meanwhile.
    """
    dtype = dtype or tensor.dtype
    target = torch.empty(tensor.shape, dtype=dtype, device=device)
    # Memory that work still uses may be given out again for work behind it on the same stream.
    copied = after = computed(device)
    target_N, source_N, step = target.view(-1), tensor.reshape(-1), BUFFER // dtype.itemsize
    for start in range(0, len(target_N), step):
        part_N = target_N[start : start + step]
        buffer_N = RING.take(len(part_N), dtype)
        try:
            copied = start_copy(part_N, buffer_N.copy_(source_N[start : start + step]), after)
        finally:
            RING.give(buffer_N, copied)
    copied.synchronize()
    return target


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device, a float one in `dtype`; it is not copied if it is so already."""
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    if not is_gpu(device) or on_gpu(tensor):
        return tensor.to(device, wanted)
    return to_gpu(tensor, device, wanted)


def to_cpu(tensor: Tensor) -> Fetch:
    """Return a function with which any thread reads a tensor on the CPU: elements start to stop [N], in a context.

    On a GPU they are in a buffer of the ring, as they will be when the present work of the current stream is done. The
    tensor must not change until its last elements are read. A tensor on the CPU is read where it is.
    """
    flat_N = tensor.reshape(-1)
    if not on_gpu(tensor):
        return lambda start, stop: nullcontext(flat_N[start:stop])
    return partial(_fetched, flat_N, computed(tensor.device))


class DoubleBuffer:
    """Two places in a GPU's memory, of `nbytes` bytes each, for groups of tensors that stay in pinned memory.

    While the computation reads the group in one place, the next group is copied to the other.
    """

    # Of the first byte of a tensor; products are as quick, and have the same bits, as with torch's own memory.
    ALIGNED = 256

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._places = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._groups: list[list[Tensor]] = [[], []]
        self._keys: list[Any] = [None, None]
        self._copied: list[Any] = [None, None]
        self._last = 0

    @classmethod
    def nbytes(cls, sizes: Iterable[int]) -> int:
        """Return the bytes of a place for tensors of these bytes."""
        return sum(-(-size // cls.ALIGNED) * cls.ALIGNED for size in sizes)

    def get(self, key: Any, group: Sequence[Tensor], following: tuple[Any, Sequence[Tensor]]) -> list[Tensor]:
        """Return a group of contiguous tensors on the GPU, for work that is queued before the next call.

        The copy of the group `following`, with its key, is started; it may be the same one.
        """
        done = computed(self._device)
        if key not in self._keys:
            self._copy(1 - self._last, key, group, done)
        self._last = place = self._keys.index(key)
        self._copied[place].wait(torch.cuda.current_stream(self._device))
        if following[0] not in self._keys:
            self._copy(1 - place, *following, done)
        return self._groups[place]

    def _copy(self, place: int, key: Any, group: Sequence[Tensor], after: Any) -> None:
        self._keys[place], self._groups[place], start = key, [], 0
        for tensor in group:
            whole = self._places[place][start : start + tensor.nbytes]
            self._groups[place].append(whole.view(tensor.dtype).view(tensor.shape))
            self._copied[place] = start_copy(self._groups[place][-1], tensor, after)
            start += self.nbytes([tensor.nbytes])


@contextmanager
def _fetched(flat_N: Tensor, after: Any, start: int, stop: int) -> Iterator[Tensor]:
    buffer_N = RING.take(stop - start, flat_N.dtype)
    try:
        start_copy(buffer_N, flat_N[start:stop], after).synchronize()
        yield buffer_N
    finally:
        RING.give(buffer_N)


def _stream(device: torch.device) -> Any:
    """Return the stream of a GPU's copies."""
    with _lock:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return _streams[device]


def _is_done(event: Any) -> bool:
    return event is None or bool(event.query())
