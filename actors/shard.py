"""The shard actor: base and experts as memory-mapped files, asked for some of their tensors at a time.

It has no state but open files: every call carries what it needs, so a shard that died is started again and asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch

from actors.process import ActorProcess, Report
from engine.checkpoints.writer import OutputFile, OutputTensor, torch_dtype, write_file
from engine.codec import Packed, pack_all, unpack_all
from engine.machine import usable_cpus
from engine.methods.arithmetic.selection import Counts, Threshold
from engine.methods.arithmetic.sparse import counts
from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.shards.weight_space import WeightSpace
from engine.storage.cache import fetch
from engine.storage.folder import Folder
from engine.storage.local_folder import digest
from engine.storage.paths import is_uri
from engine.task_vectors.coefficients import Array, TensorCoefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import TensorJob, copy_of, stream
from engine.task_vectors.streams import Inspection, TaskVectors


def _digest(file: str) -> str:
    return digest(fetch(file) if is_uri(file) else Path(file))


class Shard:
    """Task vectors of the tensors that it is asked for, on the CPU."""

    def __init__(self, plan: Plan, index: int, state: Folder | None = None) -> None:
        self._process = ActorProcess(f"shard {index}")
        self._plan, self._state = plan, state

    def inspect(self, names: Sequence[str]) -> dict[str, Inspection]:
        """Read the models' tensors once: magnitudes of their task vectors; a weight that is not finite is an error."""
        return self._models.inspect(names)

    def orthogonalise(self, names: Sequence[str]) -> dict[str, Inspection]:
        """Store the task vectors of matrices as they are made orthogonal, and say their magnitudes."""
        assert self._state is not None
        orthogonalise(self._plan, self._models, self._state, names)
        return self._task_vectors.inspect(names)

    def digests(self, files: Sequence[str]) -> dict[str, str]:
        """SHA-256 of files, by path or URI, as `sha256sum` prints it."""
        return dict(zip(files, self._models.pool.map(_digest, files), strict=True))

    def merge(self, pieces: Sequence[Piece], coefficients: Mapping[str, TensorCoefficients]) -> dict[Piece, Packed]:
        """Merged pieces in the run's dtype."""
        return pack_all(self._task_vectors.merge_all({piece: coefficients[piece.name] for piece in pieces}))

    def gradients(
        self, weight_gradients: Mapping[Piece, Packed], edges: Mapping[str, tuple[int, ...]]
    ) -> dict[Piece, Array]:
        """What pieces of weight gradients add to their tensors' coefficient gradients, [K, m] each."""
        return self._task_vectors.gradients_all(unpack_all(weight_gradients), edges)

    def target(self, folder: Folder, *names: str) -> dict[str, Packed]:
        """A target that an expert has stored, and before it a sample's inputs where it has any; asked again, the same,
        wherever it is asked.
        """
        # The files hold tensors as they travel. Read by what knows targets, they would bring all that runs a model.
        found = [safetensors.torch.load(folder.read(name)) for name in names]
        return pack_all({name: tensor for tensors in found for name, tensor in tensors.items()})

    def write(self, folder: Folder, file: OutputFile, coefficients: Mapping[str, TensorCoefficients]) -> None:
        """Write one file of the output: merged tensors where there are coefficients, the base's elsewhere."""

        def job(entry: OutputTensor) -> TensorJob:
            streams = self._task_vectors
            base = streams.base.read(entry.name)
            dtype = torch_dtype(entry.dtype) or base.dtype
            if entry.name not in coefficients:
                return TensorJob(entry.name, entry.shape, dtype, lambda: copy_of(base))
            wanted = coefficients[entry.name]
            return TensorJob(
                entry.name, entry.shape, dtype, lambda: lambda piece, out_N: streams.merge(piece, wanted, out_N)
            )

        self._write(folder, file, job)

    def combine(
        self, folder: Folder, file: OutputFile, thresholds: Sequence[Threshold] | None = None, only: int | None = None
    ) -> None:
        """Write one file of a merge that learns nothing; `only`: of the model of this one expert."""
        self._write(folder, file, lambda entry: self._recipe.job(entry, torch_dtype(entry.dtype), thresholds, only))

    def count(self, names: Sequence[str], high: Counts | None) -> Counts:
        """How many elements of each expert's task vector have each half of bits, over some tensors; see `select`."""
        found = (counts(self._recipe.tensor(name), high) for name in names)
        return sum(found, start=np.zeros((), dtype=np.int64))

    def report(self) -> Report:
        """Memory."""
        return self._process.report()

    def _write(self, folder: Folder, file: OutputFile, job: Callable[[OutputTensor], TensorJob]) -> None:
        if folder.exists(file.name):
            return  # by an earlier try of the same call
        parts = stream([job(entry) for entry in file.tensors], self._models.pool, self._models.threads)
        write_file(folder, file, lambda entry: islice(parts, len(list(pieces(entry.name, entry.shape)))))

    @cached_property
    def _models(self) -> TaskVectors:
        # Opened at the first call, not at the start: what a call raises reaches the driver as it is.
        return open_task_vectors(self._plan, usable_cpus())

    @cached_property
    def _task_vectors(self) -> TaskVectors:
        return with_orthogonal(self._plan, self._models, self._state)

    @cached_property
    def _recipe(self) -> WeightSpace:
        return WeightSpace(self._plan, self._models)
