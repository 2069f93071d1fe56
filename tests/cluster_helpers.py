"""Run whole merges on the connected Ray, disturb them, and read the results to compare."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from processes import descendants, send, titled

from cluster.crew import RayCluster
from cluster.driver import attempt
from cluster.progress import Progress
from cluster.watch import until_done
from cluster.weight_space_merge import Hosts
from engine.planning.plan import Plan
from engine.run.inputs import identity
from engine.run.preparation import check_inputs, prepare
from engine.run.run_folder import open_run


def run_merge(
    plan: Plan, out: Path, each_step: Callable[[str], None] | None = None, hosts: Hosts | None = None
) -> Path:
    """Merge on the connected Ray, or on `hosts`, and return `out`.

    `each_step` is called with a phase's name whenever it advances.
    """
    plan, records = check_inputs(plan) if plan.config.uses_samples else (plan, [])
    with open_run(str(out), identity(plan), fresh=False) as run, Progress() as progress:
        if each_step is not None:
            advance = progress.advance

            def watched(name: str, done: int, note: str = "") -> None:
                advance(name, done, note)
                each_step(name)

            progress.advance = watched  # type: ignore[method-assign]
        run.share(plan.config)
        samples = prepare(plan, records, run) if plan.config.uses_samples else []
        run.keep_plan(plan)
        losses = count()
        until_done(
            lambda: attempt(plan, samples, run, progress, hosts or RayCluster(), next(losses)),
            run.progress_marker,
            progress.say,
        )
    return out


def result(out: Path) -> dict[str, bytes]:
    """The files of an output that must not depend on the placement: weights and tables of coefficients, as bytes."""
    tables = ("coefficients", "importance", "layers", "end_check")
    files = [*out.glob("*.safetensors"), *(path for name in tables for path in out.glob(f"merge/{name}.parquet"))]
    assert len(files) >= 2
    return {path.name: path.read_bytes() for path in files}


class KillOnce:
    """A callback for `run_merge` that kills actors, once in each of the given phases.

    Args:
        victims: The title of the processes to kill, such as `ray::Trainer`, by the phase in which they are killed.
        by: The signal: SIGKILL, or SIGSTOP for actors that hang.

    Only descendants of this process are killed: the workers of the Ray that this process started.
    """

    def __init__(self, victims: Mapping[str, str], by: signal.Signals = signal.SIGKILL) -> None:
        self.victims, self.by = dict(victims), by
        self.killed: dict[str, list[int]] = {}

    def __call__(self, phase: str) -> None:
        if phase in self.victims and phase not in self.killed:
            found = titled(self.victims[phase], descendants(os.getpid()))
            send(self.by, found)
            self.killed[phase] = [process.pid for process in found]

    @property
    def missed(self) -> set[str]:
        """The phases in which no process was killed."""
        return {phase for phase in self.victims if not self.killed.get(phase)}


def stopped(command: Sequence[Any], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a merge, send it SIGTERM in the third step of stage 1, and return its exit code and standard error."""
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
