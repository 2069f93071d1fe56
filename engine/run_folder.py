"""The files of a run: what lets it go on after a stop, and an output that appears whole or not at all.

`DIR.run/` stands beside the output `DIR` while a merge runs: targets, the state after each optimiser step, metrics, and
the output as it grows. It goes when the merge is done. Knows no Ray.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml

from engine.calibration import Sample
from engine.checkpoint import weight_files
from engine.errors import OutputError
from engine.plan import Plan

RECORD = Path("merge") / "config.yaml"


@dataclass(frozen=True)
class StageState:
    """Where a stage stands: optimiser steps done, and the learner's state after them (None: none yet)."""

    steps: int
    learner: dict[str, Any] | None


def identity(plan: Plan) -> str:
    """A digest of everything that decides the result: the config but for the cluster, and the inputs' files.

    Weight files count by name, size and time of change, calibration files by their bytes.
    """
    files = [
        file
        for model in (plan.base, *plan.experts, *([plan.rows] if plan.rows else []))
        for file in weight_files(model)
    ]
    facts = {
        "config": plan.config.model_dump(exclude={"cluster", "record", "unused"}, mode="json"),
        "weights": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "calibration": [
            hashlib.sha256(path.read_bytes()).hexdigest() for expert in plan.experts for path in expert.calibration
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_output(out: Path, plan_identity: str, fresh: bool) -> bool:
    """Whether `out` is this very merge, done already; `fresh` asks for it anew.

    Raises:
        OutputError: the folder holds something else, or another merge without `fresh`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD).is_file():
        raise OutputError(
            "the output folder is in use: it holds something that is no merge", str(out), do="give another --out"
        )
    if fresh:
        return False
    try:
        record = yaml.safe_load((out / RECORD).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        record = None
    told = record.get("record") if isinstance(record, dict) else None
    if not isinstance(told, dict) or told.get("identity") != plan_identity:
        raise OutputError(
            "the output folder is in use: it holds another merge",
            str(out),
            do="give another --out, or --fresh to replace it",
        )
    return True


class RunFolder:
    """`DIR.run/` of one merge; made by `open_run`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.run")
        self.output = self.folder / "output"
        self.targets = self.folder / "targets"

    def target(self, sample: Sample) -> Path:
        """Where the target of a sample is kept."""
        return self.targets / f"{sample.expert}-{sample.index}.safetensors"

    def keep_plan(self, plan: Plan) -> Path:
        """Put the plan where every node finds it."""
        path = self.folder / "plan.pickle"
        path.write_bytes(pickle.dumps(plan))
        return path

    def load_stage(self, stage: int) -> StageState | None:
        """The state after the last optimiser step of a stage; None before the first."""
        path = self.folder / f"stage-{stage}.pt"
        if not path.exists():
            return None
        saved = torch.load(path, weights_only=True)
        return StageState(saved["steps"], saved["learner"])

    def save_stage(self, stage: int, state: StageState, rows: list[dict[str, Any]]) -> None:
        """Keep the metrics of an optimiser step, and then the state after it."""
        metrics = self.folder / "metrics" / f"{stage}-{state.steps:06}.json"
        metrics.parent.mkdir(exist_ok=True)
        metrics.write_text(json.dumps(rows), encoding="utf-8")
        path = self.folder / f"stage-{stage}.pt"
        torch.save({"steps": state.steps, "learner": state.learner}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of all steps, in their order. A step that had to be done again has overwritten its first try."""
        files = sorted((self.folder / "metrics").glob("*.json"))
        return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]

    def start_output(self) -> Path:
        """An empty folder for the output to grow in."""
        shutil.rmtree(self.output, ignore_errors=True)
        (self.output / "merge").mkdir(parents=True)
        return self.output

    def finish(self) -> None:
        """The output takes its final name, in place of an earlier merge if there is one; the run's folder goes."""
        if self.out.exists():
            self.out.rename(self.folder / "replaced")
        self.output.rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def load_plan(path: Path) -> Plan:
    """A plan that `keep_plan` kept; a file of this run's own, not of the user's."""
    plan = pickle.loads(path.read_bytes())
    assert isinstance(plan, Plan)
    return plan


@contextmanager
def open_run(out: Path, plan_identity: str, fresh: bool) -> Iterator[RunFolder]:
    """The folder of this merge's run, new or as an earlier start left it; locked until the context ends.

    Raises:
        OutputError: another process is at it, or it holds the state of another merge.
    """
    run = RunFolder(out)
    made = not run.folder.exists()
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run.folder / "lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(
            "another merge is writing to this folder", str(out), do="wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise OutputError(f"the output folder cannot be made: {error.strerror}", str(out)) from error
    try:
        record = run.folder / "identity"
        if fresh:
            for path in run.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif record.exists() and record.read_text() != plan_identity:
            raise OutputError(
                "the state of another merge into this folder is still there",
                str(run.folder),
                do="run that merge to its end, or discard it with --fresh",
            )
        record.write_text(plan_identity)
        run.targets.mkdir(exist_ok=True)
        yield run
    finally:
        if made and run.targets.exists() and not any(run.targets.iterdir()) and not any(run.folder.glob("stage-*.pt")):
            # Nothing was computed, so there is nothing to go on from: leave nothing behind.
            run.discard()
        lock.release()
