"""Task vectors that keep out of each other's way: each tensor's, cut to their leading singular parts, made orthogonal.

They are computed once, tensor by tensor with all its experts, and kept as files; from then on they stand for the
experts' own, whoever merges, learns or writes. Knows no models and no Ray.
Source: Gargiulo et al., Task Singular Vectors, arXiv 2412.00081: of τₖ = Uₖ·Σₖ·Vₖᵀ the leading r = ⌊min(m, n)/K⌋
parts, τ⊥ₖ = U⊥ₖ·Σₖ·V⊥ₖᵀ with U⊥ the orthogonal matrix nearest to [U₁ … U_K], V⊥ likewise. TSV-Merge adds all of them
with one λ; here a coefficient is learned for each. Letters: N elements of a flattened tensor.
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
from engine.methods.arithmetic.matrices import leading, orthogonal_parts
from engine.planning.plan import Plan
from engine.storage.cache import borrowed
from engine.storage.folder import Folder
from engine.task_vectors.experts import ExpertWeights
from engine.task_vectors.kinds import Product, Stored, TaskVector
from engine.task_vectors.streams import TaskVectors
from engine.task_vectors.sums import whole

# The folder in the state of a run.
FOLDER = "orthogonal"


# What λ multiplies: a coefficient lies between 0 and 1, and λ is best above 1 (1.6 for five experts, measured).
TASK_VECTOR_SCALE = 4.0


# U [m, r], Σ [r], Vᵀ [r, n].
Parts = tuple[Tensor, Tensor, Tensor]


def file_name(name: str) -> str:
    """Where a tensor's are in the state of a run: a name of ours, as a checkpoint's may be any text (`../..`)."""
    return f"{FOLDER}/{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


def orthogonalise(plan: Plan, streams: TaskVectors, state: Folder, names: Iterable[str]) -> None:
    """Store REACH · τ⊥ₖ of these tensors, as far as they are not there; `streams` have the experts' own.

    Experts and tensors are decomposed side by side; the factors of all that are asked for stand in memory.
    """
    missing = [name for name in names if not state.exists(file_name(name))]
    decompose = partial(_decompose, streams, len(plan.experts))
    begun = [[streams.pool.submit(decompose, name, k) for k in range(len(plan.experts))] for name in missing]
    parts = ({k: part for k, one in enumerate(mine) if (part := one.result())} for mine in begun)
    ended = [streams.pool.submit(_store, plan, state, name, mine) for name, mine in zip(missing, parts, strict=True)]
    for one in ended:
        one.result()


def _decompose(streams: TaskVectors, experts: int, name: str, k: int) -> Parts | None:
    """The leading parts of one expert's matrix; None where it is the base's."""
    task_vector = streams.experts[k][1].task_vector(name)
    if task_vector is None:
        return None
    tau = whole(task_vector, streams.base.read(name))
    if not tau.any():
        return None
    u, s, vt = leading(tau, max(1, min(tau.shape) // experts))
    return u.clone(), s.clone(), vt.clone()  # parts of larger tensors, which can go


def _store(plan: Plan, state: Folder, name: str, found: Mapping[int, Parts]) -> None:
    """One file: of each expert that changes the matrix its part of the orthogonal ones."""
    shape = plan.base_header.tensors[name].shape
    code = "F32" if plan.dtype == "float32" else "BF16"
    factors = dict(zip(found, _orthogonal(list(found.values())), strict=True)) if found else {}
    entries: list[OutputTensor] = []
    for k, (left, _) in factors.items():
        rank = left.shape[1]
        if plan.experts[k].kind == "adapter":
            # As it came: two factors, where K whole matrices would take many times the room.
            entries += [_entry(f"{k}.left", (shape[0], rank), "F32"), _entry(f"{k}.right", (rank, shape[1]), "F32")]
        else:
            entries.append(_entry(str(k), shape, code))

    def part(entry: OutputTensor) -> Iterator[Tensor]:
        k, _, side = entry.name.partition(".")
        left, right = factors[int(k)]
        yield {"left": left, "right": right}[side] if side else (left @ right).to(torch_dtype(entry.dtype))

    write_file(state, OutputFile(file_name(name), tuple(entries)), part)


def _entry(name: str, shape: tuple[int, ...], code: str) -> OutputTensor:
    return OutputTensor(name, shape, code, shape[0] * shape[1] * BYTES[code])


def _orthogonal(found: Sequence[Parts]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each expert the factors REACH · U⊥ₖ·Σₖ [m, r] and V⊥ₖᵀ [r, n]."""
    left, values, right = orthogonal_parts(found)
    ranks = [len(s) for _, s, _ in found]
    yield from zip(
        torch.split(left * (TASK_VECTOR_SCALE * values), ranks, dim=1), torch.split(right, ranks), strict=True
    )


def with_orthogonal(plan: Plan, streams: TaskVectors, state: Folder | None) -> TaskVectors:
    """The streams with what `orthogonalise` stored in place of the experts' own; the same where the plan asks for none.

    What is stored need not be there yet: it is opened as it is asked for.
    """
    names = frozenset(plan.orthogonal)
    if not names:
        return streams
    assert state is not None
    files = _Files(state)
    experts = [(model, _OrthogonalExpert(own, k, names, files)) for k, (model, own) in enumerate(streams.experts)]
    return streams.over(experts)


class _Files:
    """What is stored, each file opened once and its tensors kept as views: every piece of every step asks for them."""

    def __init__(self, state: Folder) -> None:
        self._state, self._lock = state, threading.Lock()
        self._opened: dict[str, dict[int, TaskVector]] = {}

    def of(self, name: str) -> Mapping[int, TaskVector]:
        """τ⊥ₖ of a matrix by k, of the experts that change it."""
        with self._lock:
            if name not in self._opened:
                with borrowed(self._state, file_name(name)) as path, safe_open(path, framework="pt") as file:
                    self._opened[name] = _stored({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            return self._opened[name]


def _stored(tensors: Mapping[str, Tensor]) -> dict[int, TaskVector]:
    """What a file holds, by expert; see `_store`."""
    found: dict[int, TaskVector] = {}
    for key, tensor in tensors.items():
        k, _, side = key.partition(".")
        if side == "left":
            found[int(k)] = Product(tensor, tensors[f"{k}.right"])
        elif not side:
            found[int(k)] = Stored(tensor.reshape(-1))
    return found


class _OrthogonalExpert:
    """See `engine.task_vectors.experts.Expert`: its own task vectors, but for the matrices."""

    def __init__(self, own: ExpertWeights, k: int, names: frozenset[str], files: _Files) -> None:
        self._own, self._k, self._names, self._files = own, k, names, files

    def task_vector(self, name: str) -> TaskVector | None:
        return self._files.of(name).get(self._k) if name in self._names else self._own.task_vector(name)

    def stored(self, name: str) -> Tensor | None:
        return self._own.stored(name)
