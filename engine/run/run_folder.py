"""The files of a run: what lets it go on after a stop, and an output that appears whole or not at all.

`OUT.run/` stands beside the output `OUT` while a merge runs: targets, the state after each optimiser step, metrics. It
goes when the merge is done. On a disk the output grows in there, and takes its name at the end. In object storage,
where nothing can be renamed, it grows in its place, and merge/config.yaml, written last, says that it is whole. Knows
no Ray.
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


# What WRITING says while an earlier merge is being removed from the output's place, and then.
CLEARING, CLEARED = b"clearing", b"cleared"


@dataclass(frozen=True)
class StageState:
    """Where a stage stands: optimiser steps done, and the learner's state after them (None: none yet)."""

    steps: int
    learner: dict[str, Any] | None


def check_output(out: str, plan_identity: str, fresh: bool) -> bool:
    """Whether `out` is this very merge, done already; `fresh` asks for it anew.

    Raises:
        OutputError: the folder holds something else, or another merge without `fresh`.
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
            "the output folder is in use: it holds something that is no merge", out, do="give another --out"
        )
    if fresh:
        return False
    try:
        record = yaml.safe_load(folder.read(RECORD).decode())
    except (yaml.YAMLError, UnicodeDecodeError):
        record = None
    told = record.get("record") if isinstance(record, dict) else None
    if not isinstance(told, dict) or told.get("identity") != plan_identity:
        raise OutputError(
            "the output folder is in use: it holds another merge",
            out,
            do="give another --out, or --fresh to replace it",
        )
    return True


class RunFolder:
    """The folders of one merge's run; `open_run` makes them.

    `out` is an absolute path or a URI. `state` is what a run goes on from; `weights` takes the output's weight files,
    and `composed`, on this machine, all else of the output.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        # Where the output is renamed to; None: it grows in its place.
        self._path = None if is_uri(out) else Path(out)
        if self._path is not None:
            self.state = open_folder(self._path.with_name(f"{self._path.name}.run"))
            self.weights = self.state.child("output")
            self.composed = Path(self.weights.where)
        else:
            address = Address.of(out, OutputError)
            if not address.path:
                raise OutputError("the output would be a whole bucket", out, f"{out.rstrip('/')}/folder")
            self.state = open_folder(str(replace(address, path=f"{address.path}.run")))
            self.weights = open_folder(out)
            self.composed = cache_folder() / "composed" / hashlib.sha256(str(address).encode()).hexdigest()
        self.held: Callable[[], None] = lambda: None

    def name(self) -> str:
        """A name for those who watch runs: the output's, and letters that no other run has; kept until it is done."""
        try:
            return self.state.read("name").decode()
        except FileNotFoundError:
            name = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', PurePosixPath(self.out).name)}-{uuid.uuid4().hex[:8]}"
            self.state.write("name", name.encode())
            return name

    def target(self, sample: Sample) -> str:
        """The name of a sample's target in the state."""
        return f"targets/{sample.expert}-{sample.index}.safetensors"

    def inputs(self, sample: Sample) -> str:
        """The name of what a sample has beside its tokens, in the state."""
        return f"inputs/{sample.expert}-{sample.index}.safetensors"

    def keep_samples(self, samples: list[list[Sample]]) -> None:
        """Keep the samples, when all their inputs are."""
        self.state.write("samples-2.pickle", pickle.dumps(samples))

    def samples(self) -> list[list[Sample]] | None:
        """The samples that an earlier start prepared, a file of this run's own; None: it did not come to its end."""
        try:
            samples: list[list[Sample]] = pickle.loads(self.state.read("samples-2.pickle"))
        except FileNotFoundError:
            return None
        return samples

    def stored_targets(self) -> set[str]:
        """The names of the targets that are there."""
        return self.state.names("targets")

    def keep_plan(self, plan: Plan) -> None:
        """Put the plan where every node finds it."""
        self.state.write("plan.pickle", pickle.dumps(plan))

    def load_stage(self, stage: int) -> StageState | None:
        """The state after the last optimiser step of a stage; None before the first."""
        try:
            saved = torch.load(io.BytesIO(self.state.read(f"stage-{stage}.pt")), weights_only=True)
        except FileNotFoundError:
            return None
        return StageState(saved["steps"], saved["learner"])

    def save_stage(self, stage: int, state: StageState, rows: list[dict[str, Any]]) -> None:
        """Keep the metrics of an optimiser step, and then the state after it.

        Raises:
            StorageError: it cannot be written, or another run has taken over.
        """
        self.held()
        self.state.write(f"metrics/{stage}-{state.steps:06}.json", json.dumps(rows).encode())
        saved = io.BytesIO()
        torch.save({"steps": state.steps, "learner": state.learner}, saved)
        self.state.write(f"stage-{stage}.pt", saved.getvalue())

    def progress_marker(self) -> object:
        """How far the run has come, to be compared with what it was before."""
        steps = [state.steps for state in map(self.load_stage, (1, 2)) if state]
        return len(self.stored_targets()), len(self.state.names(FOLDER)), steps, len(self.written())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of all steps, in their order. A step that had to be done again has overwritten its first try."""
        return [row for name in sorted(self.state.names("metrics")) for row in json.loads(self.state.read(name))]

    def keep(self, name: str, array: npt.NDArray[Any]) -> None:
        """Keep a small array of numbers."""
        saved = io.BytesIO()
        np.save(saved, array, allow_pickle=False)
        self.state.write(f"{name}.npy", saved.getvalue())

    def kept(self, name: str) -> npt.NDArray[Any] | None:
        """What `keep` kept under this name; None where it did not."""
        try:
            array: npt.NDArray[Any] = np.load(io.BytesIO(self.state.read(f"{name}.npy")), allow_pickle=False)
        except FileNotFoundError:
            return None
        return array

    def start_output(self) -> None:
        """Folders for the output to grow in, with nothing but the weight files that this very run wrote earlier."""
        self.held()
        if not self._is_cleared():
            self.state.write(WRITING, CLEARING)
            # First what says that the earlier merge is whole, and what says that it is a model.
            for name in (RECORD, "config.json", ""):
                self.weights.remove(name)
            self.state.write(WRITING, CLEARED)
        composed = LocalFolder(self.composed)
        for name in composed.names() - self.written():
            composed.remove(name)
        with storing(self.composed):
            (self.composed / "merge").mkdir(parents=True, exist_ok=True)

    def written(self) -> set[str]:
        """The names of the output's weight files that this run wrote."""
        names = self.weights.names() if self._is_cleared() else set()
        return {name for name in names if name.endswith(".safetensors")}

    def start_anew(self) -> None:
        """Remove what an earlier start left, and with it an output that it did not bring to its end."""
        if self._path is None and self.state.exists(WRITING) and not self.weights.exists(RECORD):
            self.weights.remove("")
        self.state.remove("")

    def finish(self) -> None:
        """The output is whole, in place of an earlier merge if there is one; the run's folder goes."""
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
        """Whether there is anything of a run."""
        return bool(self.state.names())

    def computed(self) -> bool:
        """Whether there is anything to go on from."""
        names = self.state.names()
        kept = ("targets/", f"{FOLDER}/", "stage-")
        return any(name.startswith(kept) for name in names) or WRITING in names or bool(self.written())

    def may_use_output(self) -> bool:
        """Whether nothing is in the output's place, unless it be what a run that is not at its end has put there."""
        if self._path is not None:
            return not self._path.exists() or (self._path.is_dir() and not any(self._path.iterdir()))
        return self.state.exists(WRITING) or not self.weights.names()

    def _is_cleared(self) -> bool:
        """Whether all that is in the output's place is of this run."""
        return self._path is not None or (self.state.exists(WRITING) and self.state.read(WRITING) == CLEARED)

    def _upload(self) -> None:
        found = [path.relative_to(self.composed).as_posix() for path in self.composed.rglob("*") if path.is_file()]
        # A folder with a config.json looks like a model, and one with the record like a merge that is done.
        for name in sorted(found, key=lambda name: (name == RECORD, Path(name).name == "config.json", name)):
            self.weights.write(name, (self.composed / name).read_bytes())


def load_plan(state: Folder) -> Plan:
    """The plan that `keep_plan` kept; a file of this run's own, not of the user's."""
    plan = pickle.loads(state.read("plan.pickle"))
    assert isinstance(plan, Plan)
    return plan


@contextmanager
def open_run(out: str, plan_identity: str, fresh: bool) -> Iterator[RunFolder]:
    """The folders of this merge's run, new or as an earlier start left them; locked until the context ends.

    Raises:
        OutputError: another process is at it, or it holds the state of another merge.
    """
    run = RunFolder(out)
    with run.state.locked() as run.held:
        state = run.state
        if fresh or not state.exists(IDENTITY) or not run.computed():
            # Without the record of whose it is, it is what a process of an earlier run, cut off, still wrote.
            run.start_anew()
        elif state.read(IDENTITY).decode() != plan_identity:
            raise OutputError(
                "the state of another merge into this folder is still there",
                state.where,
                do="run that merge to its end, or discard it with --fresh",
            )
        state.write(IDENTITY, plan_identity.encode())
        try:
            yield run
        finally:
            if not run.computed():
                # There is nothing to go on from: leave nothing behind.
                run.discard()
