"""AdaMerging through the real command line: the same config, no expert, entropies in the metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM

from engine.task_vectors.coefficients import read_coefficients

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.usefixtures("warm")


def test_adamerging_reads_experts_but_never_runs_them_for_one_coefficient_each(
    llama_merge: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    options = ("merge_method=adamerging", "parameters.granularity=task", "parameters.epochs=3")
    wanted = [part for option in options for part in ("--set", option)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "merge", str(llama_merge), *wanted, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "adamerging: " in done.stdout and "entropy" in done.stdout
    AutoModelForCausalLM.from_pretrained(out)
    _, table = read_coefficients(out / "merge" / "coefficients.parquet", 1)
    assert np.all(np.ptp(table.values, axis=1) == 0) and len(set(table.values[:, 0])) == len(table.values)
    rows = pyarrow.parquet.read_table(out / "merge" / "metrics.parquet").to_pylist()
    assert all(row["entropy"] > 0 and row["kl"] == 0 for row in rows)
    memory = json.loads((out / "merge" / "memory.json").read_text())
    assert memory["expert_forwards"] == memory["bytes_targets"] == 0
    experts = [actor["role"] for actor in memory["actors"] if actor["role"].startswith("expert")]
    assert experts == ["expert 0"], "one actor surveys both experts, one after the other"
    assert "entropy" in (out / "README.md").read_text()
