"""Scratch memory of a thread, reused from block to block: allocating it costs more than the sums computed in it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class ThreadMemory(threading.local):
    """A float32 buffer for each thread that uses it, as large as the largest request so far."""

    def __init__(self) -> None:
        self._memory_N = torch.empty(0)

    def take(self, count: int, at_least: int = 0) -> Tensor:
        """Return `count` elements [count] of this thread's buffer, uninitialised.

        A buffer that is too small is replaced by one of at least `at_least` elements. The next call in the same thread
        returns the same memory.
        """
        if self._memory_N.numel() < count:
            self._memory_N = torch.empty(max(count, at_least))
        return self._memory_N[:count]
