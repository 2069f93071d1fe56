"""The device of a run of the checks, and its results: printed as they come, and written after each check."""

from __future__ import annotations

import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Bench:
    """The device, a folder for models, and the results so far.

    `small`: sizes that a CPU computes in seconds. `families`: model families of the check of parity.
    """

    device: torch.device
    folder: Path
    path: Path
    small: bool = False
    families: Sequence[str] = ()
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, *words: object) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s]", *words, flush=True)

    def expect(self, name: str, value: float, limit: float) -> None:
        """Record a figure that must not be above its limit. NaN is above every limit."""
        ok = bool(value <= limit)
        self.results[name] = {"value": float(value), "limit": limit, "ok": ok}
        self.say("PASS" if ok else "FAIL", f"{name}: {float(value):.4g}, at most {limit:g}")

    def fact(self, name: str, value: object) -> None:
        """Record a figure without a limit."""
        self.results[name] = {"value": value}
        text = f"{value:.4g}" if isinstance(value, float) else value
        self.say("    ", f"{name}: {text}")

    def skip(self, name: str) -> None:
        """Record that a check needs a GPU."""
        self.results[name] = {"skipped": "needs a GPU"}
        self.say("SKIP", name)

    def run(self, checks: Sequence[Callable[[Any], None]]) -> list[str]:
        """Run the checks one after the other, whatever they find, and return the names of what failed."""
        for check in checks:
            self.say("==", f"{check.__name__}: {check.__doc__ or ''}")
            try:
                check(self)
            except Exception:  # noqa: BLE001 - a check that fails must not hide the results of the others
                text = traceback.format_exc()
                self.results[check.__name__] = {"ok": False, "error": text[-2000:]}
                self.say("FAIL", f"{check.__name__} raised", text)
            if self.on_gpu:
                torch.cuda.empty_cache()
            self.path.write_text(json.dumps(self.results, indent=1, default=str) + "\n")
        return [name for name, result in self.results.items() if result.get("ok") is False]

    def wait(self) -> None:
        """Wait until the GPU has done all that is queued."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def waits(self) -> Iterator[list[warnings.WarningMessage]]:
        """Yield a list that receives a warning each time that the context waits for the GPU."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield seen
            finally:
                if self.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
                # Torch also warns that it does not see all waits.
                seen[:] = [one for one in seen if "called a synchronizing" in str(one.message)]

    def seconds(self, call: Callable[[], object], times: int = 3) -> float:
        """Return the mean seconds of a call after a first one."""
        call()
        self.wait()
        began = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - began) / times

    def start_peak(self) -> None:
        """Free what is dropped, and begin to measure the largest memory of the GPU."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Return the largest memory of tensors on the GPU since `start_peak`, in bytes; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else 0

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return pinned memory [count]; ordinary memory where there is no GPU."""
        return torch.empty(count, dtype=dtype, pin_memory=self.on_gpu)
