"""Peak anonymous and pinned memory of this process. File-mapped pages do not count: the kernel can reclaim them.

A thread reads RssAnon of /proc/self/status many times a second. Anonymous of smaps_rollup is the same figure, but
reading it walks the page tables and blocks allocations of other threads meanwhile.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class PeakMemory:
    """Samples the anonymous memory of this process until it is closed or collected. Linux only; 0 elsewhere."""

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self._peak = anonymous_bytes()
        self._stop = threading.Event()
        arguments = weakref.ref(self), self._stop, interval_seconds
        threading.Thread(target=_sample, args=arguments, name="peak-memory", daemon=True).start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return os.getpid()

    @property
    def peak(self) -> int:
        """The peak so far, in bytes."""
        self._peak = max(self._peak, anonymous_bytes())
        return self._peak

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()


def _sample(watched: weakref.ref[PeakMemory], stop: threading.Event, interval_seconds: float) -> None:
    """Update the peak at every interval, until `stop` is set or the `PeakMemory` is collected."""
    while not stop.wait(interval_seconds):
        memory = watched()
        if memory is None:
            return
        _ = memory.peak
        del memory


def anonymous_bytes() -> int:
    """Return the current anonymous memory of this process in bytes; 0 if the system does not report it."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def peak_pinned_bytes() -> int:
    """Return the peak of the memory that torch pins for copies to and from GPUs; it is not anonymous memory."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    return int(torch.cuda.host_memory_stats()["allocated_bytes.peak"])
