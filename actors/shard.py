"""The shard actor: task vectors from the memory-mapped files of base and experts.

A shard has no state but open files. Each call carries all that it needs, so Ray can restart a shard and retry the call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from actors.gpus import NO_GPUS, Gpus
from actors.process import ActorProcess, Report, guarded
from engine.checkpoints.writer import OutputFile, OutputTensor, torch_dtype, write_file
from engine.codec import Packed, pack_all, unpack_all
from engine.correction.files import load_calibrated
from engine.correction.steps import TensorSteps, steps_around
from engine.learning.targets import is_damaged
from engine.machine import usable_cpus
from engine.methods.prepass import Array as Measured
from engine.output.survival import keep_survival, load_survival
from engine.planning.open_models import base_folder, open_task_vectors, weight_files
from engine.planning.plan import Plan
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.shards.prepasses import NOTHING, Known, measured
from engine.shards.projections import fit_layers
from engine.shards.statistics import MergeStatistics
from engine.shards.weight_space import WeightSpace
from engine.statistics.fits import LayerFit
from engine.storage.cache import fetch
from engine.storage.folder import Folder
from engine.storage.local_folder import digest
from engine.storage.paths import is_uri
from engine.storage.sealed import has_digest, keep_digest
from engine.task_vectors.coefficients import Array, TensorCoefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import Fill, TensorJob, copy_of, stream
from engine.task_vectors.rounding import Rounding, Survival
from engine.task_vectors.streams import Inspection, TaskVectors

if TYPE_CHECKING:
    from engine.compression.model import CompressedModel

# Subfolder of the checksums of the output's files.
OUTPUT = "output"


def _digest(file: str) -> str:
    return digest(fetch(file) if is_uri(file) else Path(file))


class Shard:
    """Merges, inner products and output files of the tensors that a call names, on the CPU.

    `gpus`: see `ActorProcess`.
    """

    def __init__(self, plan: Plan, index: int, state: Folder | None = None, gpus: Gpus = NO_GPUS) -> None:
        self._process = ActorProcess(f"shard {index}", gpus=gpus)
        self._plan, self._state, self._by_lapack = plan, state, 0

    def check_base(self, files: Sequence[str]) -> dict[str, str]:
        """Read these weight files of the base (paths or URIs) once, and return their SHA-256 in hexadecimal by file.

        Raises:
            CheckpointError: A weight is not finite.
        """
        paths = {file.address: file.path for file in weight_files(self._plan.base) if file.address in files}
        hashes = {file: self._models.pool.submit(digest, path) for file, path in paths.items()}
        read, folder = set(paths.values()), base_folder(self._plan)
        names = [name for name, tensor in self._plan.base_header.tensors.items() if folder / tensor.file in read]
        self._models.over([]).inspect(names)
        return {file: sha256.result() for file, sha256 in hashes.items()}

    @guarded
    def orthogonalise(self, names: Sequence[str], factored: Collection[str] = ()) -> dict[str, Inspection]:
        """Store the orthogonal task vectors of matrices and return their magnitudes, on a GPU if the seat has one.

        Those of matrices in `factored` are stored as factors.
        """
        assert self._state is not None
        device = self._process.device
        self._by_lapack += len(orthogonalise(self._plan, self._models, self._state, names, factored, device))
        return self._task_vectors.inspect(names, with_base=False)

    def fit(self, names: Sequence[str]) -> dict[str, LayerFit]:
        """Return the coefficients of layers whose outputs come nearest to the experts'; see `fit_layers`."""
        return fit_layers(self._plan, self._models, self._task_vectors, MergeStatistics(self._plan, self._state), names)

    def digests(self, files: Sequence[str]) -> dict[str, str]:
        """Return the SHA-256 of files (paths or URIs), by file, in hexadecimal."""
        return dict(zip(files, self._models.pool.map(_digest, files), strict=True))

    def merge(self, pieces: Sequence[Piece], coefficients: Mapping[str, TensorCoefficients]) -> dict[Piece, Packed]:
        """Return merged pieces in the run's dtype."""
        return pack_all(self._task_vectors.merge_all({piece: coefficients[piece.name] for piece in pieces}))

    def gradients(
        self, weight_gradients: Mapping[Piece, Packed], edges: Mapping[str, tuple[int, ...]]
    ) -> dict[Piece, Array]:
        """Return the parts of ∂L/∂α, [K, m], that pieces of weight gradients contribute to their tensors."""
        return self._task_vectors.gradients_all(unpack_all(weight_gradients), edges)

    def damaged(self, folder: Folder, names: Sequence[str]) -> dict[str, bool]:
        """Return whether these stored files are damaged, by name."""
        return {name: is_damaged(folder, name, self._plan.base_header.vocab_size) for name in names}

    def incomplete(self, folder: Folder, names: Sequence[str]) -> dict[str, bool]:
        """Return whether these files of the output are not as they were written, by name. Reads each of them once."""
        state = self._state
        assert state is not None
        return {
            name: load_survival(state, name) is None or not has_digest(state, f"{OUTPUT}/{name}", folder, name)
            for name in names
        }

    def write(self, folder: Folder, file: OutputFile, coefficients: Mapping[str, TensorCoefficients]) -> None:
        """Write one file of the output: a tensor is merged if it has coefficients, and copied from the base if not."""

        def job(entry: OutputTensor) -> TensorJob:
            streams = self._task_vectors
            base = streams.base.read(entry.name)
            name, dtype = entry.name, torch_dtype(entry.dtype) or base.dtype
            if name not in coefficients:
                return TensorJob(name, entry.shape, dtype, lambda: copy_of(base))
            wanted, config = coefficients[name], self._plan.config
            rounding = Rounding.of(name, base, config.rounding, config.seed)
            fill: Fill = lambda piece, out_N: streams.merge(piece, wanted, out_N)  # noqa: E731
            return self._steps[0].after(TensorJob(name, entry.shape, dtype, lambda: fill, rounding))

        self._write(folder, file, job)

    def combine(self, folder: Folder, file: OutputFile, known: Known = NOTHING, only: int | None = None) -> None:
        """Write one file of a weight-space merge. `only`: the file belongs to the output model of this one expert."""

        def job(entry: OutputTensor) -> TensorJob:
            return self._steps[0].after(self._weight_space.job(entry, torch_dtype(entry.dtype), known, only))

        self._write(folder, file, job)

    def calibrated(self, folder: Folder, file: OutputFile) -> None:
        """Write one file of the output from the state's files of the merged model and of its solved tensors."""
        state = self._state
        assert state is not None

        def job(entry: OutputTensor) -> TensorJob:
            name, base = entry.name, self._models.base.read(entry.name)
            merged = name in self._plan.merged_set
            rounding = Rounding.of(name, base, self._plan.config.rounding, self._plan.config.seed) if merged else None
            dtype = torch_dtype(entry.dtype) or base.dtype
            solved = TensorJob(name, entry.shape, dtype, lambda: copy_of(load_calibrated(state, name)), rounding)
            return self._steps[1].after(solved)

        self._write(folder, file, job)

    def compressed(self, folder: Folder, file: OutputFile) -> None:
        """Write one file of the smaller model, expert by expert, from the base and the state's compressed layers."""
        assert self._state is not None
        if not folder.exists(file.name):
            sha256 = write_file(folder, file, lambda entry: self._compressed.parts(entry.name))
            keep_digest(self._state, f"{OUTPUT}/{file.name}", sha256)

    def measure(self, method: str, index: int, names: Sequence[str], known: Known) -> dict[str, Measured]:
        """Return the arrays of a prepass of a method for the named tensors; see `measured`."""
        tensors = (self._weight_space.tensor(name, known) for name in names)
        return measured(self._plan, method, index, tensors, self._models.threads)

    def forget(self) -> None:
        """Do nothing: a shard holds no model."""

    def report(self) -> Report:
        """Return the memory figures of the process, and the number of decompositions that LAPACK had to make."""
        return self._process.report(by_lapack=self._by_lapack)

    def _write(self, folder: Folder, file: OutputFile, job: Callable[[OutputTensor], TensorJob]) -> None:
        state = self._state
        if folder.exists(file.name) and (state is None or load_survival(state, file.name) is not None):
            return  # written by an earlier attempt at the same call
        survived: dict[str, Survival] = {}
        parts = stream([job(entry) for entry in file.tensors], self._models.pool, self._models.threads, survived)
        sha256 = write_file(folder, file, lambda entry: islice(parts, len(list(pieces(entry.name, entry.shape)))))
        if state is not None:
            keep_survival(state, file.name, survived)
            keep_digest(state, f"{OUTPUT}/{file.name}", sha256)

    @cached_property
    def _compressed(self) -> CompressedModel:
        from engine.compression.model import CompressedModel  # transformers, which no other shard needs

        assert self._state is not None
        return CompressedModel(self._plan, self._state)

    @cached_property
    def _models(self) -> TaskVectors:
        # Opened in a call and not in __init__: an error raised in a call reaches the driver unchanged.
        return open_task_vectors(self._plan, usable_cpus())

    @cached_property
    def _task_vectors(self) -> TaskVectors:
        return with_orthogonal(self._plan, self._models, self._state)

    @cached_property
    def _steps(self) -> tuple[TensorSteps, TensorSteps]:
        """The steps on single tensors: before layers are solved block by block, and after."""
        statistics = MergeStatistics(self._plan, self._state)
        before, after = (TensorSteps(self._plan, steps, self._models, statistics) for steps in steps_around(self._plan))
        return before, after

    @cached_property
    def _weight_space(self) -> WeightSpace:
        return WeightSpace(self._plan, self._models, self._state)
