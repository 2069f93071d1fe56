"""CUDA without a GPU: a stream of copies does its work only when something waits for it, and never by itself.

Operations on tensors run at once, as if each GPU's own stream were always idle. A copy that nothing waits for is
therefore never seen, and a buffer that is used again too early spoils the copy from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import engine.transfers
from engine.transfers import Ring


class Stream:
    """A stream of copies if it is `lazy`; else that of a GPU's computation, which is done with all its work."""

    # One for all: streams that wait for each other's events, each in a thread, would take theirs in another order.
    _lock = threading.RLock()

    def __init__(self, device: torch.device, lazy: bool = True) -> None:
        self.device, self.lazy = torch.device(device), lazy
        self.work: list[Callable[[], object]] = []
        self._done = 0

    def add(self, call: Callable[[], object]) -> None:
        with self._lock:
            self.work.append(call)
            if not self.lazy:
                self.run(len(self.work))

    def run(self, count: int) -> None:
        """Do the work up to this number of calls."""
        with self._lock:
            while self._done < count:
                self._done += 1
                self.work[self._done - 1]()

    def left(self) -> int:
        """The calls that are queued."""
        return len(self.work) - self._done

    def done(self, count: int) -> bool:
        return self._done >= count

    def wait_event(self, event: Event) -> None:
        self.add(event.synchronize)


class Event:
    def __init__(self, blocking: bool = False) -> None:
        assert blocking, "a thread that waits must leave its core"
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.count = stream, len(stream.work)

    def synchronize(self) -> None:
        assert self.stream is not None, "not recorded"
        self.stream.run(self.count)

    def wait(self, stream: Stream) -> None:
        stream.wait_event(self)

    def query(self) -> bool:
        assert self.stream is not None
        return self.stream.done(self.count)


class Cuda:
    """The fake devices: streams of copies by device, the pinned buffers, and where events of computations came from."""

    def __init__(self) -> None:
        self.copies: dict[torch.device, Stream] = {}
        self.pinned: list[Tensor] = []
        self.asked: list[torch.device] = []
        self._own: dict[torch.device, Stream] = {}
        self._current = threading.local()

    def stream(self, device: torch.device) -> Stream:
        assert device not in self.copies, "one stream of copies for a device"
        return self.copies.setdefault(device, Stream(device))

    def current_stream(self, device: torch.device) -> Stream:
        self.asked.append(device)
        return self._own.setdefault(device, Stream(device, lazy=False))

    def late_stream(self, device: torch.device) -> Stream:
        """Let the computation of a device have a stream that does its work only when something waits for it, too."""
        return self._own.setdefault(device, Stream(device))

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        self._current.stream = stream
        try:
            yield
        finally:
            del self._current.stream

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._current.stream.add(lambda: target.detach().copy_(source))

    def pin(self, nbytes: int) -> Tensor:
        self.pinned.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return self.pinned[-1]


def fake_cuda(monkeypatch: pytest.MonkeyPatch, buffers: int = 3, nbytes: int = 1 << 16) -> Cuda:
    """Take every tensor for one on a GPU, with a ring of so many buffers of so many bytes."""
    cuda, ring = Cuda(), Ring(buffers, nbytes)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.using)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(engine.transfers, "_streams", {})
    monkeypatch.setattr(engine.transfers, "copy", cuda.copy)
    monkeypatch.setattr(engine.transfers, "pinned", cuda.pin)
    for module in ("engine.transfers", "engine.learning.student"):
        monkeypatch.setattr(f"{module}.RING", ring)
    for module in ("engine.transfers", "engine.learning.student", "cluster.remote_shards"):
        monkeypatch.setattr(f"{module}.on_gpu", lambda tensor: True)
    return cuda
