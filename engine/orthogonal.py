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
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoint import Expert, Product, Stored, TaskVector
from engine.headers import BYTES
from engine.methods.svd import leading, nearest_orthogonal
from engine.plan import SAFETENSORS, Plan
from engine.storage import Folder, borrowed
from engine.task_vectors import TaskVectors
from engine.writer import OutputFile, OutputTensor, torch_dtype, write_file

# What λ multiplies: a coefficient lies between 0 and 1, and λ is best above 1 (1.6 for five experts, measured).
REACH = 4.0

# U [m, r], Σ [r], Vᵀ [r, n].
Parts = tuple[Tensor, Tensor, Tensor]


def file_name(name: str) -> str:
    """Where a tensor's are in the state of a run: a name of ours, as a checkpoint's may be any text (`../..`)."""
    return f"orthogonal/{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


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
    task_vector, base = streams.experts[k][1].task_vector(name), streams.base.read(name)
    if task_vector is None:
        return None
    tau = torch.empty(base.shape)
    task_vector.block(0, base.numel(), base.reshape(-1).float(), tau.view(-1))
    if not tau.any():
        return None
    u, s, vt = leading(tau, max(1, min(tau.shape) // experts))
    return u.clone(), s.clone(), vt.clone()  # parts of larger tensors, which can go


def _store(plan: Plan, state: Folder, name: str, found: Mapping[int, Parts]) -> None:
    """One file: of each expert that changes the matrix its part of the orthogonal ones."""
    shape = plan.base_header.tensors[name].shape
    code = "F32" if SAFETENSORS[plan.dtype] == "F32" else "BF16"
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
    ranks = [len(s) for _, s, _ in found]
    left = nearest_orthogonal(torch.cat([u for u, _, _ in found], dim=1))
    right = nearest_orthogonal(torch.cat([vt for _, _, vt in found]))
    for u, (_, s, _), vt in zip(torch.split(left, ranks, dim=1), found, torch.split(right, ranks), strict=True):
        yield u * (REACH * s), vt


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
    return TaskVectors(streams.base, experts, streams.dtype, streams.threads)


class _Files:
    """The stored files, opened once."""

    def __init__(self, state: Folder) -> None:
        self._state, self._lock = state, threading.Lock()
        self._open: dict[str, Any] = {}

    def task_vector(self, k: int, name: str) -> TaskVector | None:
        """τ⊥ₖ of a matrix; None where the expert does not change it."""
        with self._lock:
            if name not in self._open:
                with borrowed(self._state, file_name(name)) as path:
                    self._open[name] = safe_open(path, framework="pt")
            file = self._open[name]
            keys = file.keys()
            if str(k) in keys:
                return Stored(file.get_tensor(str(k)).reshape(-1))
            if f"{k}.left" in keys:
                return Product(file.get_tensor(f"{k}.left"), file.get_tensor(f"{k}.right"))
        return None


class _OrthogonalExpert:
    """See `engine.checkpoint.Expert`: its own task vectors, but for the matrices."""

    def __init__(self, own: Expert, k: int, names: frozenset[str], files: _Files) -> None:
        self._own, self._k, self._names, self._files = own, k, names, files

    def task_vector(self, name: str) -> TaskVector | None:
        return self._files.task_vector(self._k, name) if name in self._names else self._own.task_vector(name)

    def stored(self, name: str) -> Tensor | None:
        return self._own.stored(name)
