"""Peak anonymous memory: memory that was freed again counts, mapped files do not."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import actors.memory
from actors.memory import PeakMemory, anonymous_bytes, peak_pinned_bytes
from actors.process import ActorProcess

MIB = 1 << 20

pytestmark = pytest.mark.skipif(anonymous_bytes() == 0, reason="the system does not report anonymous memory")


@pytest.fixture
def memory() -> Iterator[PeakMemory]:
    gc.collect()
    sampler = PeakMemory(interval_seconds=0.005)
    yield sampler
    sampler.close()


def test_freed_memory_counts_in_the_peak(memory: PeakMemory) -> None:
    before = anonymous_bytes()
    block = np.ones(64 * MIB, dtype=np.uint8)
    time.sleep(0.3)  # the sampler's thread shares two busy cores with others
    del block
    assert anonymous_bytes() < before + 16 * MIB
    assert before + 60 * MIB < memory.peak < before + 80 * MIB


def test_a_mapped_file_does_not_count(memory: PeakMemory, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(b"\1" * MIB)
    before = memory.peak
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert int(mapped.sum(dtype=np.int64)) == 64 * MIB
    time.sleep(0.05)
    assert memory.peak < before + 8 * MIB


def test_the_peak_never_falls(memory: PeakMemory) -> None:
    figures = []
    for size in (24, 8, 0):
        block = np.ones(size * MIB, dtype=np.uint8)
        time.sleep(0.02)
        figures.append(memory.peak)
        del block
    assert figures == sorted(figures)


def test_the_figure_agrees_with_the_kernel_s_count_of_the_page_tables() -> None:
    block = np.ones(64 * MIB, dtype=np.uint8)
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Anonymous: +(\d+) kB$", rollup, flags=re.MULTILINE)
    assert found is not None
    assert anonymous_bytes() == pytest.approx(int(found[1]) * 1024, rel=0.02)
    assert anonymous_bytes() > block.nbytes


def test_a_closed_sampler_stops() -> None:
    sampler = PeakMemory(interval_seconds=0.005)
    sampler.close()
    time.sleep(0.1)
    before = sampler.peak
    block = np.ones(64 * MIB, dtype=np.uint8)
    time.sleep(0.05)
    del block
    assert sampler.peak < before + 32 * MIB


@pytest.mark.parametrize("content", [None, "Name:\tpython\nVmRSS:\t 100 kB\n", ""])
def test_a_system_without_the_figure_gives_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    status = tmp_path / "status"
    if content is not None:
        status.write_text(content)
    monkeypatch.setattr(actors.memory, "STATUS", status)
    assert anonymous_bytes() == 0
    sampler = PeakMemory()
    assert sampler.peak == 0
    sampler.close()


def test_pinned_memory_is_reported_once_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_pinned_bytes() == ActorProcess("trainer").report().peak_pinned_bytes == 0
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 7 * MIB})
    assert peak_pinned_bytes() == ActorProcess("trainer").report().peak_pinned_bytes == 7 * MIB
