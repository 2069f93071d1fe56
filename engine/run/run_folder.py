"""The files of a run: the state from which a merge resumes, and an output that appears whole or not at all.

`OUT.run/` stands next to the output `OUT` while a merge runs. It holds the targets, the state after each optimiser step
and the metrics, and is removed when the merge is complete. On a disk, the output is written in `OUT.run/` and renamed
at the end. Objects in object storage cannot be renamed, so there the output is written in its final place, and
merge/config.yaml, written last, marks it as complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from engine.calibration.samples import Sample
from engine.errors import OutputError, StorageError
from engine.planning.plan import Plan
from engine.shards.orthogonal import FOLDER
from engine.storage.address import Address
from engine.storage.cache import cache_folder
from engine.storage.folder import Folder, storing
from engine.storage.local_folder import LocalFolder, sweep
from engine.storage.paths import is_uri, open_folder

RECORD = "merge/config.yaml"
IDENTITY, WRITING = "identity", "writing"
# Contents of WRITING: while an earlier merge is being removed from the output's place, and afterwards.
CLEARING, CLEARED = b"clearing", b"cleared"


@dataclass(frozen=True)
class StageState:
    """The progress of a stage: completed optimiser steps, and the learner's state after them (None before any)."""

    steps: int
    learner: dict[str, Any] | None


def check_output(out: str, plan_identity: str, fresh: bool) -> bool:
    """Return whether `out` already holds the complete result of this merge; False with `fresh`, which redoes it.

    Raises:
        OutputError: `out` holds something other than a merge, or, without `fresh`, another merge.
    """
    run, folder = RunFolder(out), open_folder(out)
    try:
        done = folder.exists(RECORD)
    except StorageError as error:
        raise OutputError(error.what, out, do=error.do) from error
    if not done:
        if run.may_use_output():
            return False
        raise OutputError(
            "the output folder is in use: it holds something other than a merge", out, do="give another --out"
        )
    if fresh:
        return False
    try:
        record = yaml.safe_load(folder.read(RECORD).decode())
    except (yaml.YAMLError, UnicodeDecodeError):
        record = None
    entry = record.get("record") if isinstance(record, dict) else None
    if not isinstance(entry, dict) or entry.get("identity") != plan_identity:
        raise OutputError(
            "the output folder is in use: it holds another merge",
            out,
            do="give another --out, or --fresh to replace it",
        )
    return True


class RunFolder:
    """The folders of one run; `open_run` creates them.

    Attributes:
        out: The output, an absolute path or a URI.
        state: The folder of everything that is needed to resume.
        weights: The folder for the output's weight files.
        composed: The local folder for all other files of the output.
        held: Raises StorageError, when called, if another process has taken the run over.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        # The path to which the output is renamed; None where it is written in its final place.
        self._path = None if is_uri(out) else Path(out)
        if self._path is not None:
            self.state = open_folder(self._path.with_name(f"{self._path.name}.run"))
            self.weights = self.state.child("output")
            self.composed = Path(self.weights.where)
        else:
            address = Address.of(out, OutputError)
            if not address.path:
                raise OutputError("the output is a whole bucket", out, str(replace(address, path="folder")))
            self.state = open_folder(str(replace(address, path=f"{address.path}.run")))
            self.weights = open_folder(out)
            self.composed = cache_folder() / "composed" / hashlib.sha256(str(address).encode()).hexdigest()
        self.held: Callable[[], None] = lambda: None

    def name(self) -> str:
        """Return the run's name for gauges and trackers: the output's name and 8 random hex digits.

        It stays the same until the run is complete.
        """
        try:
            return self.state.read("name").decode()
        except FileNotFoundError:
            name = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', PurePosixPath(self.out).name)}-{uuid.uuid4().hex[:8]}"
            self.state.write("name", name.encode())
            return name

    def target(self, sample: Sample) -> str:
        """Return the file name of a sample's target in the state."""
        return f"targets/{sample.expert}-{sample.index}.safetensors"

    def inputs(self, sample: Sample) -> str:
        """Return the file name of a sample's pixel inputs in the state."""
        return f"inputs/{sample.expert}-{sample.index}.safetensors"

    def keep_samples(self, samples: list[list[Sample]]) -> None:
        """Store the samples, after all of their pixel inputs."""
        self.state.write("samples-2.pickle", pickle.dumps(samples))

    def samples(self) -> list[list[Sample]] | None:
        """Return the samples that an earlier start prepared, or None if its preparation was not complete.

        The file is a pickle that only this run writes.
        """
        try:
            samples: list[list[Sample]] = pickle.loads(self.state.read("samples-2.pickle"))
        except FileNotFoundError:
            return None
        return samples

    def stored_targets(self) -> set[str]:
        """Return the file names of the stored targets."""
        return self.state.names("targets")

    def keep_plan(self, plan: Plan) -> None:
        """Store the plan in the state, where every node can read it."""
        self.state.write("plan.pickle", pickle.dumps(plan))

    def load_stage(self, stage: int) -> StageState | None:
        """Return the state after the last completed optimiser step of a stage, or None before the first."""
        try:
            saved = torch.load(io.BytesIO(self.state.read(f"stage-{stage}.pt")), weights_only=True)
        except FileNotFoundError:
            return None
        return StageState(saved["steps"], saved["learner"])

    def save_stage(self, stage: int, state: StageState, rows: list[dict[str, Any]]) -> None:
        """Store the metrics rows of an optimiser step, then the state after it.

        Raises:
            StorageError: a file cannot be written, or another process has taken the run over.
        """
        self.held()
        self.state.write(f"metrics/{stage}-{state.steps:06}.json", json.dumps(rows).encode())
        saved = io.BytesIO()
        torch.save({"steps": state.steps, "learner": state.learner}, saved)
        self.state.write(f"stage-{stage}.pt", saved.getvalue())

    def progress_marker(self) -> object:
        """Return a value that changes whenever the run makes progress."""
        steps = [state.steps for state in map(self.load_stage, (1, 2)) if state]
        return len(self.stored_targets()), len(self.state.names(FOLDER)), steps, len(self.written())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics rows of all steps in order. A repeated step has overwritten the rows of its first try."""
        return [row for name in sorted(self.state.names("metrics")) for row in json.loads(self.state.read(name))]

    def keep(self, name: str, array: npt.NDArray[Any]) -> None:
        """Store a small numeric array under a name."""
        saved = io.BytesIO()
        np.save(saved, array, allow_pickle=False)
        self.state.write(f"{name}.npy", saved.getvalue())

    def kept(self, name: str) -> npt.NDArray[Any] | None:
        """Return the array that `keep` stored under a name, or None."""
        try:
            array: npt.NDArray[Any] = np.load(io.BytesIO(self.state.read(f"{name}.npy")), allow_pickle=False)
        except FileNotFoundError:
            return None
        return array

    def start_output(self) -> None:
        """Create the output's folders, and remove everything in them except weight files that this run wrote."""
        self.held()
        if not self._is_cleared():
            self.state.write(WRITING, CLEARING)
            # First the files that mark a complete merge and a model, so that a half-removed merge looks like neither.
            for name in (RECORD, "config.json", ""):
                self.weights.remove(name)
            self.state.write(WRITING, CLEARED)
        composed = LocalFolder(self.composed)
        for name in composed.names() - self.written():
            composed.remove(name)
        with storing(self.composed):
            (self.composed / "merge").mkdir(parents=True, exist_ok=True)

    def written(self) -> set[str]:
        """Return the names of the weight files that this run has written."""
        names = self.weights.names() if self._is_cleared() else set()
        return {name for name in names if name.endswith(".safetensors")}

    def start_anew(self) -> None:
        """Remove the state of an earlier start, and its output if that is incomplete."""
        if self._path is None and self.state.exists(WRITING) and not self.weights.exists(RECORD):
            self.weights.remove("")
        self.state.remove("")

    def finish(self) -> None:
        """Move the complete output into its place, replacing an earlier merge, and remove the run's folder."""
        self.held()
        if self._path is None:
            self._upload()
        else:
            with storing(self._path):
                sweep(self.composed)
                if self._path.exists():
                    self._path.rename(self.composed.with_name("replaced"))
                self.composed.rename(self._path)
        self.discard()

    def discard(self) -> None:
        """Remove the run's folder."""
        self.held()
        self.state.remove("")
        if self._path is None:
            shutil.rmtree(self.composed, ignore_errors=True)

    def exists(self) -> bool:
        """Return whether the run has any files."""
        return bool(self.state.names())

    def computed(self) -> bool:
        """Return whether the run has results from which a merge can resume."""
        names = self.state.names()
        kept = ("targets/", f"{FOLDER}/", "stage-")
        return any(name.startswith(kept) for name in names) or WRITING in names or bool(self.written())

    def may_use_output(self) -> bool:
        """Return whether the output's place is empty, apart from files of an unfinished run."""
        if self._path is not None:
            return not self._path.exists() or (self._path.is_dir() and not any(self._path.iterdir()))
        return self.state.exists(WRITING) or not self.weights.names()

    def _is_cleared(self) -> bool:
        """Return whether every file in the output's place belongs to this run."""
        return self._path is not None or (self.state.exists(WRITING) and self.state.read(WRITING) == CLEARED)

    def _upload(self) -> None:
        names = [path.relative_to(self.composed).as_posix() for path in self.composed.rglob("*") if path.is_file()]
        # config.json marks a model and the record marks a complete merge, so these two are written last.
        for name in sorted(names, key=lambda name: (name == RECORD, Path(name).name == "config.json", name)):
            self.weights.write(name, (self.composed / name).read_bytes())


def load_plan(state: Folder) -> Plan:
    """Return the plan that `keep_plan` stored, from a pickle that only this run writes."""
    plan = pickle.loads(state.read("plan.pickle"))
    assert isinstance(plan, Plan)
    return plan


@contextmanager
def open_run(out: str, plan_identity: str, fresh: bool) -> Iterator[RunFolder]:
    """Open the folders of a merge's run, new or as an earlier start left them, and lock them during the context.

    Raises:
        OutputError: another process holds the lock, or the folder holds the state of another merge.
    """
    run = RunFolder(out)
    with run.state.locked() as run.held:
        state = run.state
        if fresh or not state.exists(IDENTITY) or not run.computed():
            # Without an identity, the files were written by a cut-off process of an earlier run after its end.
            run.start_anew()
        elif state.read(IDENTITY).decode() != plan_identity:
            raise OutputError(
                "the state of another merge into this folder still exists",
                state.where,
                do="complete that merge, or discard its state with --fresh",
            )
        state.write(IDENTITY, plan_identity.encode())
        try:
            yield run
        finally:
            if not run.computed():
                run.discard()
