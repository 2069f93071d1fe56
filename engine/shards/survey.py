"""The survey of an expert: one reading of its checkpoint, which gives all that a merge must know of its weights.

These are the magnitude of every task vector and whether every weight is finite, the SHA-256 of the files, and the
leading singular parts of the matrices that are made orthogonal. The tensors are read group by group in the order of the
base's files, which is that of the expert's, too, if both were saved by the same library. The files are hashed in step,
as far into them as the reading has come, so that a byte is hashed and used while it is in the page cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch

from engine.checkpoints.headers import BYTES
from engine.errors import DamagedError
from engine.methods.arithmetic.matrices import Parts
from engine.planning.costs.flops import decompositions
from engine.planning.factors import decomposed
from engine.planning.open_models import WeightFile, open_task_vectors, weight_files
from engine.planning.plan import Plan
from engine.shards.parts import Surveyed, compute_parts, load_surveyed, store_group, tensor_groups
from engine.storage.cache import CHUNK
from engine.storage.folder import Folder
from engine.task_vectors.pipeline import in_order


class Survey:
    """The survey of expert `index`, with `threads` threads; matrices are decomposed on `device`.

    `by_lapack` lists the matrices of which matrix products did not find the leading parts, so that LAPACK had to.
    """

    def __init__(self, plan: Plan, index: int, device: torch.device, threads: int) -> None:
        self.index, self._plan, self._device = index, plan, device
        self._streams = open_task_vectors(plan, threads, index)
        self.by_lapack: list[str] = []
        self._groups, self._matrices = tensor_groups(plan), frozenset(decomposed(plan))
        self._hashes = _Hashes(weight_files(plan.experts[index]))
        ends, total = list[float](), 0.0
        for group in self._groups:
            total += sum(self._nbytes(name) for name in group)
            ends.append(total)
        self._shares = [end / max(1.0, total) for end in ends]

    def read(self, groups: Sequence[int], state: Folder) -> dict[int, Surveyed]:
        """Survey these groups, store the results in the run's state, and return them by group.

        Groups that an earlier attempt at the same call has stored are not read again.

        Raises:
            CheckpointError: a tensor has a NaN or infinite weight; the error names the tensor and the model.
        """
        surveyed = {group: record for group in groups if (record := self._stored(state, group)) is not None}
        missing = [group for group in groups if group not in surveyed]
        if not missing:
            return surveyed
        pool, threads = self._streams.pool, self._streams.threads
        ahead = decompositions(self._plan, threads) if self._matrices else threads
        hashed = pool.submit(self._hashes.advance, self._shares[missing[-1]])
        calls = (partial(self._measure, name) for group in missing for name in self._groups[group])
        measured = in_order(calls, pool, ahead - 1)
        for group in missing:
            names = self._groups[group]
            results = [next(measured) for _ in names]
            matrices = not self._matrices.isdisjoint(names)
            parts = {place: part for place, (_, part) in enumerate(results) if part is not None} if matrices else None
            last = group == len(self._groups) - 1
            if last:
                hashed.result()
            surveyed[group] = store_group(
                state,
                self.index,
                group,
                [magnitude for magnitude, _ in results],
                parts,
                self._hashes.digests() if last else {},
            )
        hashed.result()
        return surveyed

    def _stored(self, state: Folder, group: int) -> Surveyed | None:
        try:
            return load_surveyed(state, self.index, group, len(self._groups[group]))
        except DamagedError:
            return None

    def _measure(self, name: str) -> tuple[float, Parts | None]:
        """Return mean |τ| of a tensor and, if it is to be made orthogonal, its leading parts."""
        magnitude = float(self._streams.inspection(name, with_base=False).magnitudes[0])
        if name not in self._matrices:
            return magnitude, None
        (task_vector,) = self._streams.of(name)
        base, by_lapack = self._streams.base.read(name), partial(self.by_lapack.append, name)
        return magnitude, compute_parts(self._plan, task_vector, base, self._device, by_lapack)

    def _nbytes(self, name: str) -> int:
        tensor = self._plan.base_header.tensors[name]
        return tensor.numel * BYTES[tensor.dtype]


class _Hashes:
    """The SHA-256 of files that are read one after the other, up to a share of all of their bytes.

    Kept in memory alone: after a restart of the process, the files are read again from the beginning.
    """

    def __init__(self, files: Sequence[WeightFile]) -> None:
        self._files = files
        self._sizes = [file.path.stat().st_size for file in files]
        self._hashes = [hashlib.sha256() for _ in files]
        self._done = [0] * len(files)

    def advance(self, share: float) -> None:
        """Read and hash on until this share of all bytes has been hashed; 1 for the whole files."""
        wanted = sum(self._sizes) if share >= 1 else int(share * sum(self._sizes))
        for number, size in enumerate(self._sizes):
            self._hash(number, min(max(wanted, 0), size))
            wanted -= size

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of all files, by path or URI, in hexadecimal."""
        self.advance(1)
        return {file.address: sha256.hexdigest() for file, sha256 in zip(self._files, self._hashes, strict=True)}

    def _hash(self, number: int, end: int) -> None:
        if end <= self._done[number]:
            return
        with open(self._files[number].path, "rb", buffering=0) as file:
            file.seek(self._done[number])
            while (left := end - self._done[number]) > 0 and (data := file.read(min(left, CHUNK))):
                self._hashes[number].update(data)
                self._done[number] += len(data)
