"""Memory that a thread keeps from one block to the next, since fresh memory would cost more than the sums in it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class ThreadMemory(threading.local):
    """A float32 buffer for each thread that uses it, as large as the largest request so far."""

    def __init__(self) -> None:
        self._memory_N = torch.empty(0)

    def take(self, count: int, at_least: int = 0) -> Tensor:
        """Return `count` elements of this thread's buffer, of any content; `at_least` elements are allocated.

        The next call in the same thread returns the same memory.
        """
        if self._memory_N.numel() < count:
            self._memory_N = torch.empty(max(count, at_least))
        return self._memory_N[:count]
