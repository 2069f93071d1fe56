"""Machine code that is kept from one process to the next, and a cache of it that is damaged or not this user's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Prints the number of signatures that were compiled and the number of those that were loaded.
KERNEL = """
import numpy as np
from engine.compiled import compiled, keep_compiled

def _double(values):
    for i in range(values.shape[0]):
        values[i] *= 2

double, values = compiled(_double), np.ones(2)
keep_compiled()
double(values)
assert list(values) == [2, 2]
print(sum(double.stats.cache_misses.values()), sum(double.stats.cache_hits.values()))
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A script with a compiled function."""
    (tmp_path / "sources").mkdir()
    script = tmp_path / "sources" / "kernel.py"
    script.write_text(KERNEL)
    return script


def run(kernel: Path, cache: Path) -> str:
    environment = {**os.environ, "EXPERT_MERGING_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, kernel], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_what_a_process_compiled_is_loaded_by_the_next(kernel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(kernel, cache) == "1 0"
    assert run(kernel, cache) == "0 1"
    for pattern in ("*.nbi", "*.nbc"):
        (file,) = (cache / "kernels").rglob(pattern)
        file.write_bytes(file.read_bytes()[:20])
        assert run(kernel, cache) == "1 0", "damaged, so compiled again"
    assert run(kernel, cache) == "0 1"
    kernel.with_name("called.py").write_text("CALLED = 1")
    assert run(kernel, cache) == "1 0", "what it may call has changed"


@pytest.mark.thorough
def test_nothing_is_kept_in_a_folder_to_which_others_can_write(kernel: Path, tmp_path: Path) -> None:
    shared, blocked = tmp_path / "shared", tmp_path / "a file"
    (shared / "kernels").mkdir(parents=True)
    (shared / "kernels").chmod(0o777)
    blocked.write_text("")
    for cache in (shared, blocked):
        assert [run(kernel, cache) for _ in range(2)] == ["1 0"] * 2
    assert not list((shared / "kernels").iterdir())
