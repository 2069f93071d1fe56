"""Whole merges on the Ray that is connected, and what of them must not depend on the placement."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.driver import attempt
from cluster.progress import Progress
from engine.planning.plan import Plan
from engine.run.identity import identity
from engine.run.preparation import check_inputs, prepare
from engine.run.run_folder import open_run


def run_merge(plan: Plan, out: Path, each_step: Callable[[str], None] | None = None) -> Path:
    """Merge on the Ray that is connected; `each_step` is called with a phase's name as it advances."""
    plan, records = check_inputs(plan) if plan.config.learned else (plan, [])
    with open_run(str(out), identity(plan), fresh=False) as run, Progress() as progress:
        if each_step is not None:
            advance = progress.advance

            def watched(name: str, done: int, note: str = "") -> None:
                advance(name, done, note)
                each_step(name)

            progress.advance = watched  # type: ignore[method-assign]
        samples = prepare(plan, records, run) if plan.config.learned else []
        run.keep_plan(plan)
        attempt(plan, samples, run, progress, identity(plan))
    return out


def result(out: Path) -> dict[str, bytes]:
    """What must not depend on who computed it: weights, coefficients and importance, byte for byte."""
    files = [*out.glob("*.safetensors"), *out.glob("merge/coefficients.parquet"), *out.glob("merge/importance.parquet")]
    assert len(files) >= 2
    return {path.name: path.read_bytes() for path in files}


def pids() -> list[int]:
    """Of every process."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def pids_titled(title: str) -> list[int]:
    """Of the processes whose title begins so, on this machine."""
    found = []
    for pid in pids():
        try:
            if (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").startswith(title):
                found.append(pid)
        except OSError:
            continue
    return found


def stopped(command: Sequence[Any], environment: Mapping[str, str]) -> tuple[int, str]:
    """The exit code and the standard error of a merge that is told to stop in its third step."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if "stage 1 3/" in line:
                run.send_signal(signal.SIGTERM)
                break
        run.stdout.read()
        message: str = run.stderr.read()
    return run.returncode, message
