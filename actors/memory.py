"""Peak anonymous memory of this process: what it cannot give back, file-mapped pages left out.

A thread of its own reads RssAnon of /proc/self/status many times a second: the same pages as Anonymous of smaps_rollup,
from a counter, where the latter walks the page tables and holds up whoever allocates meanwhile. Knows nothing else.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

STATUS = Path("/proc/self/status")


class PeakMemory:
    """Samples from its making on; `peak` in bytes, 0 where the system does not tell (it is Linux that does)."""

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self._peak = anonymous_bytes()
        self._stop = threading.Event()
        arguments = weakref.ref(self), self._stop, interval_seconds
        threading.Thread(target=_sample, args=arguments, name="peak-memory", daemon=True).start()

    @property
    def pid(self) -> int:
        """Whose memory it is."""
        return os.getpid()

    @property
    def peak(self) -> int:
        """The highest figure so far, in bytes."""
        self._peak = max(self._peak, anonymous_bytes())
        return self._peak

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()


def _sample(watched: weakref.ref[PeakMemory], stop: threading.Event, interval_seconds: float) -> None:
    """Look again and again, until told to stop or until nobody wants to know."""
    while not stop.wait(interval_seconds):
        memory = watched()
        if memory is None:
            return
        _ = memory.peak
        del memory


def anonymous_bytes() -> int:
    """Anonymous memory of this process now, in bytes; 0 where the system does not tell."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
