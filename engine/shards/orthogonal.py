"""Orthogonal task vectors: per matrix, the leading singular parts of every expert, made orthogonal across experts.

They are computed once, matrix by matrix over all experts, and stored as files in the run's state. Merging, learning and
writing then read them in place of the experts' own task vectors.
Source: Gargiulo et al., Task Singular Vectors, arXiv 2412.00081: of τₖ = Uₖ·Σₖ·Vₖᵀ the leading r = ⌊min(m, n)/K⌋
parts, τ⊥ₖ = U⊥ₖ·Σₖ·V⊥ₖᵀ with U⊥ the orthogonal matrix nearest to [U₁ … U_K], V⊥ likewise. TSV-Merge adds all of them
with one λ; here a coefficient is learned for each. Directions that several experts have in common are shared among them
(`orthogonal_parts`). Letters: m rows and n columns of a matrix, r rank, K experts.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoints.headers import BYTES
from engine.checkpoints.writer import OutputFile, OutputTensor, torch_dtype, write_file
from engine.methods.arithmetic.matrices import Parts, leading_parts, orthogonal_parts
from engine.planning.plan import Plan
from engine.storage.cache import borrowed
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.sealed import digest_name, has_digest, keep_digest, refuse
from engine.task_vectors.experts import ExpertWeights
from engine.task_vectors.kinds import Product, Stored, TaskVector
from engine.task_vectors.streams import TaskVectors

# Subfolder of the run's state.
FOLDER = "orthogonal"
# Factor of the stored task vectors: coefficients lie between 0 and 1, but the best λ is above 1 (1.6 for five experts,
# measured).
TASK_VECTOR_SCALE = 4.0


def file_name(name: str) -> str:
    """Return the file of a tensor's task vectors in the run's state.

    The name is a hash, since a tensor's name in a checkpoint may be any text (`../..`).
    """
    return f"{FOLDER}/{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


def orthogonalise(plan: Plan, streams: TaskVectors, state: Folder, names: Iterable[str]) -> None:
    """Store TASK_VECTOR_SCALE · τ⊥ₖ of the named matrices, except those already stored.

    All matrices and experts are decomposed in parallel on the pool of `streams`, which read the experts' own task
    vectors. The factors of all named matrices are in memory at a time.
    """
    # A checksum is written after its file.
    missing = [
        name for name in names if not (state.exists(file_name(name)) and state.exists(digest_name(file_name(name))))
    ]
    decompose = partial(_decompose, streams, len(plan.experts))
    decomposed = [[streams.pool.submit(decompose, name, k) for k in range(len(plan.experts))] for name in missing]
    parts = ({k: part for k, future in enumerate(row) if (part := future.result())} for row in decomposed)
    written = [streams.pool.submit(_store, plan, state, name, some) for name, some in zip(missing, parts, strict=True)]
    for future in written:
        future.result()


def _decompose(streams: TaskVectors, experts: int, name: str, k: int) -> Parts | None:
    """Return the leading parts of expert k's matrix, or None if it equals the base's."""
    base = streams.base.read(name)
    parts = leading_parts(streams.experts[k][1].task_vector(name), base, max(1, min(base.shape) // experts))
    if parts is None:
        return None
    u, s, vt = parts
    return u.clone(), s.clone(), vt.clone()  # copies, so that the full factors can be freed


def _store(plan: Plan, state: Folder, name: str, parts: Mapping[int, Parts]) -> None:
    """Write the file of one matrix from the `parts` of the experts that change it.

    An expert k has one entry `k`, or the factors `k.left` and `k.right` if it is an adapter.
    """
    shape = plan.base_header.tensors[name].shape
    code = "F32" if plan.dtype == "float32" else "BF16"
    factors = dict(zip(parts, _orthogonal(list(parts.values())), strict=True)) if parts else {}
    entries: list[OutputTensor] = []
    for k, (left, _) in factors.items():
        rank = left.shape[1]
        if plan.experts[k].kind == "adapter":
            # Kept as factors: K whole matrices would take many times the space.
            entries += [_entry(f"{k}.left", (shape[0], rank), "F32"), _entry(f"{k}.right", (rank, shape[1]), "F32")]
        else:
            entries.append(_entry(str(k), shape, code))

    def values(entry: OutputTensor) -> Iterator[Tensor]:
        k, _, side = entry.name.partition(".")
        left, right = factors[int(k)]
        yield {"left": left, "right": right}[side] if side else (left @ right).to(torch_dtype(entry.dtype))

    keep_digest(state, file_name(name), write_file(state, OutputFile(file_name(name), tuple(entries)), values))


def _entry(name: str, shape: tuple[int, ...], code: str) -> OutputTensor:
    return OutputTensor(name, shape, code, shape[0] * shape[1] * BYTES[code])


def _orthogonal(parts: Sequence[Parts]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors TASK_VECTOR_SCALE · U⊥ₖ·Σₖ [m, r] and V⊥ₖᵀ [r, n] of each expert."""
    left, values, right = orthogonal_parts(parts)
    ranks = [len(s) for _, s, _ in parts]
    yield from zip(
        torch.split(left * (TASK_VECTOR_SCALE * values), ranks, dim=1), torch.split(right, ranks), strict=True
    )


def with_orthogonal(plan: Plan, streams: TaskVectors, state: Folder | None) -> TaskVectors:
    """Return streams that read stored orthogonal task vectors for the matrices in `plan.orthogonal`.

    Returns `streams` itself if the plan has none. A file is opened at its first use and may be written until then.
    """
    names = frozenset(plan.orthogonal)
    if not names:
        return streams
    assert state is not None
    files = _Files(state)
    experts = [(model, _OrthogonalExpert(expert, k, names, files)) for k, (model, expert) in enumerate(streams.experts)]
    return streams.over(experts)


class _Files:
    """The stored task vectors. Each file is opened once and kept as views, since every piece of every step reads it.

    A damaged file is removed, so that the next start of the run computes it again.
    """

    def __init__(self, state: Folder) -> None:
        self._state, self._lock = state, threading.Lock()
        self._opened: dict[str, dict[int, TaskVector]] = {}

    def of(self, name: str) -> Mapping[int, TaskVector]:
        """Return τ⊥ₖ of a matrix by k, for the experts that change it."""
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open(file_name(name))
            return self._opened[name]

    def _open(self, stored: str) -> dict[int, TaskVector]:
        with borrowed(self._state, stored) as path:
            if not has_digest(self._state, stored, LocalFolder(path.parent), path.name):
                self._state.remove(stored)
                refuse(f"{self._state.where}/{stored}")
            with safe_open(path, framework="pt") as file:
                return _stored({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def _stored(tensors: Mapping[str, Tensor]) -> dict[int, TaskVector]:
    """Return the task vectors of a file written by `_store`, by expert."""
    task_vectors: dict[int, TaskVector] = {}
    for key, tensor in tensors.items():
        k, _, side = key.partition(".")
        if side == "left":
            task_vectors[int(k)] = Product(tensor, tensors[f"{k}.right"])
        elif not side:
            task_vectors[int(k)] = Stored(tensor.reshape(-1))
    return task_vectors


class _OrthogonalExpert:
    """The `ExpertWeights` of expert k with the matrices `names` read from `files`, all other tensors from `expert`."""

    def __init__(self, expert: ExpertWeights, k: int, names: frozenset[str], files: _Files) -> None:
        self._expert, self._k, self._names, self._files = expert, k, names, files

    def task_vector(self, name: str) -> TaskVector | None:
        return self._files.of(name).get(self._k) if name in self._names else self._expert.task_vector(name)

    def stored(self, name: str) -> Tensor | None:
        return self._expert.stored(name)
