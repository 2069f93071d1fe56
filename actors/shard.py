"""The shard actor: base and experts as memory-mapped files, asked for some of their tensors at a time.

It has no state but open files: every call carries what it needs, so a shard that died is started again and asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from actors.process import Process, Report, usable_cpus
from engine.codec import Packed, pack_all, unpack_all
from engine.coefficients import Array, TensorCoefficients
from engine.plan import Plan
from engine.task_vectors import Inspection, Piece, TaskVectors, open_task_vectors
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

    def merge(self, pieces: Sequence[Piece], coefficients: Mapping[str, TensorCoefficients]) -> dict[Piece, Packed]:
        """Merged pieces in the run's dtype."""
        return pack_all(self._task_vectors.merge_all({piece: coefficients[piece.name] for piece in pieces}))

    def gradients(
        self, weight_gradients: Mapping[Piece, Packed], edges: Mapping[str, tuple[int, ...]]
    ) -> dict[Piece, Array]:
        """What pieces of weight gradients add to their tensors' coefficient gradients, [K, m] each."""
        return self._task_vectors.gradients_all(unpack_all(weight_gradients), edges)

    def write(self, folder: Path, file: OutputFile, coefficients: Mapping[str, TensorCoefficients]) -> None:
        """Write one file of the output: merged tensors where there are coefficients, the base's elsewhere."""

        def parts(entry: OutputTensor) -> Iterable[Tensor]:
            dtype = torch_dtype(entry.dtype)
            if entry.name in coefficients:
                return self._task_vectors.stream(entry.name, coefficients[entry.name], dtype)
            base = self._task_vectors.base.read(entry.name)
            return [base if dtype is None else base.to(dtype)]

        write_file(folder, file, parts)

    def report(self) -> Report:
        """Memory."""
        return self._process.report()

    @cached_property
    def _task_vectors(self) -> TaskVectors:
        # Opened at the first call, not at the start: what a call raises reaches the driver as it is.
        return open_task_vectors(self._plan, usable_cpus())
