"""The memory of trainer and shard at a small size: independent of K (law 1), and not above the baseline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_memory_is_independent_of_k_and_not_above_the_baseline(tmp_path: Path) -> None:
    result = tmp_path / "memory_guard.json"
    guard = [sys.executable, str(BENCHMARKS / "memory_guard.py"), "--workdir", str(tmp_path), "--json", str(result)]
    subprocess.run(guard, check=True, capture_output=True)
    report = json.loads(result.read_text())
    assert len(report["targets"]) == 3
    assert all(target["met"] for target in report["targets"]), report["targets"]
    compare = [sys.executable, str(BENCHMARKS / "compare.py"), str(result)]
    compared = subprocess.run(
        [*compare, str(BENCHMARKS / "baselines" / "memory_guard.json")], check=False, capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
