"""Stand-ins for the functions of torch.cuda on a machine without GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class FakeGpus:
    """GPUs as torch.cuda shows them to a process.

    Attributes:
        free: Free bytes of each, which a test may change.
        peak: Bytes that `max_memory_allocated` returns; twice as many are reserved.
        current: The position of the default device; None if nobody has set it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, free: float = 80e9) -> None:
        self.free: list[int] = [int(free)] * count
        self.current: int | None = None
        self.peak = 1000
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", self._set)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self._memory)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * self.peak)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Fake {device.index}")

    def _set(self, device: torch.device) -> None:
        self.current = device.index

    def _memory(self, device: Any) -> tuple[int, int]:
        return self.free[torch.device("cuda", device).index if isinstance(device, int) else device.index], int(80e9)
