"""The shard actor: base and experts as memory-mapped files, asked for some of their tensors at a time.

It has no state but open files: every call carries what it needs, so a shard that died is started again and asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from actors.process import Process, Report, usable_cpus
from engine.checkpoint import open_base, open_expert
from engine.codec import Packed, pack_all, unpack_all
from engine.coefficients import Array, TensorCoefficients
from engine.plan import Plan
from engine.task_vectors import Inspection, TaskVectors
from engine.writer import OutputFile, OutputTensor, torch_dtype, write_file


class Shard:
    """Task vectors of the tensors that it is asked for, on the CPU."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._process = Process(f"shard {index}")
        self._plan = plan

    def inspect(self, names: Sequence[str]) -> dict[str, Inspection]:
        """Read the tensors once: magnitudes of their task vectors; a weight that is not finite is an error."""
        return self._task_vectors.inspect(names)

    def digests(self, files: Sequence[Path]) -> dict[Path, str]:
        """SHA-256 of files, as `sha256sum` prints it."""
        found = {}
        for file in files:
            with open(file, "rb") as opened:
                found[file] = hashlib.file_digest(opened, "sha256").hexdigest()
        return found

    def merge(self, coefficients: Mapping[str, TensorCoefficients]) -> dict[str, Packed]:
        """Merged tensors in the run's dtype."""
        return pack_all(self._task_vectors.merge(coefficients))

    def gradients(
        self, edges: Mapping[str, tuple[int, ...]], weight_gradients: Mapping[str, Packed]
    ) -> dict[str, Array]:
        """Coefficient gradients [K, m] of tensors from their weight gradients."""
        return self._task_vectors.gradients(edges, unpack_all(weight_gradients))

    def write(self, folder: Path, file: OutputFile, coefficients: Mapping[str, TensorCoefficients]) -> None:
        """Write one file of the output: merged tensors where there are coefficients, the base's elsewhere."""

        def tensor(entry: OutputTensor) -> Tensor:
            dtype = torch_dtype(entry.dtype)
            if entry.name in coefficients:
                return self._task_vectors.merge({entry.name: coefficients[entry.name]}, dtype)[entry.name]
            base = self._task_vectors.base.read(entry.name)
            return base if dtype is None else base.to(dtype)

        write_file(folder, file, tensor)

    def report(self) -> Report:
        """Memory."""
        return self._process.report()

    @cached_property
    def _task_vectors(self) -> TaskVectors:
        # Opened at the first call, not at the start: what a call raises reaches the driver as it is.
        experts = [(expert.name, open_expert(expert)) for expert in self._plan.experts]
        return TaskVectors(open_base(self._plan), experts, getattr(torch, self._plan.dtype), threads=usable_cpus())
