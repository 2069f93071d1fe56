"""The checks for a machine with a GPU (`make gpu-check`) run, on a CPU and with small models."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "benchmarks"))


def checked(path: Path, *arguments: str) -> dict[str, dict[str, object]]:
    """Run the checks, and return their results by name."""
    command = [sys.executable, "-m", *arguments, "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_checks_pass_on_a_cpu_with_small_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process, which has imported torch and transformers already.
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_check.__main__ import main

    path = tmp_path / "results.json"
    with pytest.raises(SystemExit) as end:
        main(["--device", "cpu", "--small", "--family", "llama", "--json", str(path)], standalone_mode=False)
    assert end.value.code == 0, path.read_text()
    results = json.loads(path.read_text())
    passed = [name for name, result in results.items() if result.get("ok")]
    assert len(passed) >= 15
    assert {name for name, result in results.items() if "skipped" in result} == {"no_waiting", "full_gpu"}


def test_a_check_that_raises_or_misses_fails_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_check.bench import Bench

    bench = Bench(torch.device("cpu"), tmp_path, tmp_path / "results.json")

    def raises(bench: Bench) -> None:
        raise ZeroDivisionError

    def misses(bench: Bench) -> None:
        bench.expect("missed", math.nan, 1)
        bench.expect("met", 1, 1)

    assert bench.run([raises, misses]) == ["raises", "missed"]
    written = json.loads(bench.path.read_text())
    assert {name: result["ok"] for name, result in written.items()} == {"raises": False, "missed": False, "met": True}


@pytest.mark.thorough
@pytest.mark.timeout(900)  # two merges and a third start of Ray, on a machine that may be busy
def test_the_checks_with_ray_pass_on_a_cpu(tmp_path: Path) -> None:
    results = checked(tmp_path / "results.json", "gpu_check.on_ray", "--device", "cpu")
    assert results["with the trainer killed: weights differ"]["ok"]
