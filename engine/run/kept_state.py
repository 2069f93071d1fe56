"""What a run keeps in the folder of its state, and what happens if a file of it is damaged.

A damaged file is reported in one line and computed again where that is possible; see `engine.storage.sealed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from engine.calibration.samples import Sample
from engine.errors import DamagedError
from engine.learning.targets import is_damaged
from engine.planning.plan import Plan
from engine.run.state import (
    PLAN,
    StageState,
    decode_array,
    decode_devices,
    decode_names,
    decode_rows,
    decode_samples,
    decode_stage,
    encode_array,
    encode_plan,
    encode_samples,
    encode_stage,
)
from engine.shards.parts import SURVEY, Surveyed, load_surveyed, record_file, tensor_groups
from engine.storage.folder import Folder
from engine.storage.sealed import read_sealed, refuse, write_sealed

# Small files of the state that are read at a time.
READERS = 16
# The files of arrays that `keep` stores, and the list of files that come from a cache (`engine.run.reuse`).
MAGNITUDES, PRIOR, REUSED = "magnitudes.safetensors", "prior.safetensors", "reused.json"


class KeptState:
    """Samples, plan, states of stages, metrics and small arrays in the folder of a run's state.

    Attributes:
        state: The folder.
        held: Raises StorageError, when called, if another process has taken the run over.
        say: Called with a line for the user.
    """

    def __init__(self, state: Folder) -> None:
        self.state = state
        self.held: Callable[[], None] = lambda: None
        self.say: Callable[[str], None] = print
        self._said: set[str] = set()

    def target(self, sample: Sample) -> str:
        """Return the file name of a sample's target in the state."""
        return f"targets/{sample.expert}-{sample.index}.safetensors"

    def inputs(self, sample: Sample) -> str:
        """Return the file name of a sample's pixel inputs in the state."""
        return f"inputs/{sample.expert}-{sample.index}.safetensors"

    def keep_samples(self, samples: list[list[Sample]]) -> None:
        """Store the samples, after all of their pixel inputs."""
        write_sealed(self.state, "samples.json", encode_samples(samples))

    def samples(self, plan: Plan) -> list[list[Sample]] | None:
        """Return the samples that an earlier start prepared, or None if they or their pixel inputs are not complete."""
        content = self._read("samples.json", "the samples are prepared again")
        if content is None:
            return None
        try:
            samples = decode_samples(content, plan, self._where("samples.json"))
        except DamagedError:
            self._damaged("samples.json", "the samples are prepared again")
            return None
        for name in [self.inputs(sample) for of_expert in samples for sample in of_expert if sample.inputs]:
            if is_damaged(self.state, name, plan.base_header.vocab_size):
                self._damaged(name, "the samples are prepared again")
                return None
        return samples

    def stored_targets(self) -> set[str]:
        """Return the file names of the stored targets."""
        return self.state.names("targets")

    def forget(self, names: Iterable[str], what: str) -> None:
        """Remove damaged files from the state, and say that `what` happens to them."""
        for name in sorted(names):
            self._damaged(name, what)
            self.state.remove(name)

    def surveyed(self, plan: Plan) -> dict[tuple[int, int], Surveyed]:
        """Return what the surveys of experts found, by expert and group of tensors. Damaged records are removed."""
        stored, groups = self.state.names(SURVEY), tensor_groups(plan)
        places = [(k, group) for k in range(len(plan.experts)) for group in range(len(groups))]
        places = [place for place in places if record_file(*place) in stored]

        def load(place: tuple[int, int]) -> Surveyed | None:
            try:
                return load_surveyed(self.state, *place, len(groups[place[1]]))
            except DamagedError:
                return None

        with ThreadPoolExecutor(READERS) as threads:
            found = dict(zip(places, threads.map(load, places), strict=True))
        self.forget([record_file(*place) for place in places if found[place] is None], "the weights are read again")
        return {place: record for place, record in found.items() if record is not None}

    def keep_plan(self, plan: Plan) -> None:
        """Store the plan in the state, where every node can read it."""
        write_sealed(self.state, PLAN, encode_plan(plan))

    def load_stage(self, stage: int) -> StageState | None:
        """Return the state after the last completed optimiser step of a stage, or None before the first.

        Without the metrics of all of its steps, a state is not used.
        """
        name, again = stage_file(stage), f"stage {stage} is computed again"
        content = self._read(name, again)
        if content is None:
            return None
        try:
            state = decode_stage(content, self._where(name))
        except DamagedError:
            self._damaged(name, again)
            return None
        stored = self.state.names("metrics")
        for rows in (rows_file(stage, steps + 1) for steps in range(state.steps)):
            if rows not in stored or self._rows_of(rows) is None:
                self._damaged(rows, again)
                return None
        return state

    def save_stage(self, stage: int, state: StageState, rows: list[dict[str, Any]]) -> None:
        """Store the metrics rows of an optimiser step, then the state after it.

        Raises:
            StorageError: a file cannot be written, or another process has taken the run over.
        """
        self.held()
        write_sealed(self.state, rows_file(stage, state.steps), json.dumps(rows).encode())
        write_sealed(self.state, stage_file(stage), encode_stage(state))

    def steps_taken(self) -> int:
        """Return the number of optimiser steps whose metrics are stored."""
        return len(self.state.names("metrics"))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics rows of all steps in order. A repeated step has overwritten the rows of its first try.

        Raises:
            DamagedError: a file is damaged.
        """
        names = sorted(self.state.names("metrics"))
        return [row for name in names for row in decode_rows(read_sealed(self.state, name), self._where(name))]

    def keep(self, name: str, array: npt.NDArray[Any]) -> None:
        """Store a small numeric array under a name."""
        write_sealed(self.state, f"{name}.safetensors", encode_array(array))

    def kept(self, name: str, shape: tuple[int | None, ...], again: str = "") -> npt.NDArray[Any] | None:
        """Return the array that `keep` stored under a name, or None.

        Args:
            name: The name.
            shape: The shape that the array must have; None for any length.
            again: What happens if the file is damaged, which makes the result None.

        Raises:
            DamagedError: the file is damaged, or the array has another shape, and `again` is not given.
        """
        file = f"{name}.safetensors"
        try:
            array = decode_array(read_sealed(self.state, file), self._where(file))
            if len(array.shape) != len(shape) or any(
                n not in (None, m) for n, m in zip(shape, array.shape, strict=True)
            ):
                refuse(self._where(file))
        except FileNotFoundError:
            return None
        except DamagedError:
            if not again:
                raise
            self._damaged(file, again)
            return None
        return array

    def reused(self) -> dict[str, list[str]]:
        """Return the names of the files that come from a cache, by kind; see `engine.run.reuse`."""
        try:
            return decode_names(read_sealed(self.state, REUSED), self._where(REUSED))
        except (FileNotFoundError, DamagedError):
            return {}

    def keep_devices(self, devices: dict[str, Any]) -> None:
        """Store what the trainer and the experts compute on: GPUs, threads and types of GPUs."""
        write_sealed(self.state, "devices.json", json.dumps(devices).encode())

    def load_devices(self) -> dict[str, Any] | None:
        """Return what `keep_devices` stored, or None.

        Raises:
            DamagedError: the file is damaged.
        """
        try:
            return decode_devices(read_sealed(self.state, "devices.json"), self._where("devices.json"))
        except FileNotFoundError:
            return None

    def _where(self, name: str) -> str:
        return f"{self.state.where}/{name}"

    def _read(self, name: str, again: str) -> bytes | None:
        """Return the content of a state file, or None if it is absent or, as then is said, damaged."""
        try:
            return read_sealed(self.state, name)
        except FileNotFoundError:
            return None
        except DamagedError:
            self._damaged(name, again)
            return None

    def _rows_of(self, name: str) -> list[dict[str, Any]] | None:
        try:
            return decode_rows(read_sealed(self.state, name), self._where(name))
        except DamagedError:
            return None

    def _damaged(self, name: str, again: str) -> None:
        """Say once that a file is damaged, however often it is read."""
        if name not in self._said:
            self._said.add(name)
            self.say(f"{self._where(name)}: damaged or missing; {again}")


def stage_file(stage: int) -> str:
    """Return the file name of the state of a stage."""
    return f"stage-{stage}.safetensors"


def rows_file(stage: int, steps: int) -> str:
    """Return the file name of the metrics rows of the step after which a stage has completed `steps`."""
    return f"metrics/{stage}-{steps:06}.json"
