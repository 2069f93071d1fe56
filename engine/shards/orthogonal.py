"""Orthogonal task vectors: per matrix, the leading singular parts of every expert, made orthogonal across experts.

They are computed once, matrix by matrix over all experts, and stored as files in the run's state. Merging, learning and
writing then read them in place of the experts' own task vectors.
Source: Gargiulo et al., Task Singular Vectors, arXiv 2412.00081: of τₖ = Uₖ·Σₖ·Vₖᵀ the leading r = ⌊min(m, n)/K⌋
parts, τ⊥ₖ = U⊥ₖ·Σₖ·V⊥ₖᵀ with U⊥ the orthogonal matrix nearest to [U₁ … U_K], V⊥ likewise. TSV-Merge adds all of them
with one λ; here a coefficient is learned for each. Directions that several experts have in common are shared among them
(`orthogonal_parts`).

With `task_vectors: swudi`, they are in the same way the shares of the experts in the result of SWUDI-A (`swudi_parts`),
to which they add up where all coefficients are 1/TASK_VECTOR_SCALE.
Letters: m rows and n columns of a matrix, r rank, K experts.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoints.headers import BYTES
from engine.checkpoints.writer import OutputFile, OutputTensor, torch_dtype, write_file
from engine.methods.arithmetic.matrices import Parts, orthogonal_parts, swudi_parts
from engine.planning.costs.flops import decompositions
from engine.planning.factors import decomposed, stored_dtype
from engine.planning.plan import Plan
from engine.shards.parts import compute_parts, load_parts, one_at_a_time, remove_parts, tensor_groups
from engine.storage.cache import borrowed
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.sealed import digest_name, has_digest, keep_digest, refuse
from engine.task_vectors.experts import ExpertWeights
from engine.task_vectors.factors import Factors
from engine.task_vectors.kinds import Product, Stored, TaskVector
from engine.task_vectors.pipeline import in_order
from engine.task_vectors.streams import TaskVectors

# Subfolder of the run's state.
FOLDER = "orthogonal"
# Factor of the stored task vectors: coefficients lie between 0 and 1, but the best λ is above 1 (1.6 for five experts,
# measured).
TASK_VECTOR_SCALE = 4.0
CPU = torch.device("cpu")


def file_name(name: str) -> str:
    """Return the file of a tensor's task vectors in the run's state.

    The name is a hash, since a tensor's name in a checkpoint may be any text (`../..`).
    """
    return f"{FOLDER}/{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


def orthogonalise(
    plan: Plan,
    streams: TaskVectors,
    state: Folder,
    names: Iterable[str],
    factored: Collection[str] = (),
    device: torch.device = CPU,
) -> list[str]:
    """Store TASK_VECTOR_SCALE · τ⊥ₖ of the named matrices (or whole τₖ, see `decomposed`), except those already stored.

    Those of matrices in `factored` are stored as factors, which take no more space for many experts than for two; the
    others whole, one matrix for each expert. The experts' leading parts are those that `engine.shards.parts` stored,
    which are removed afterwards. Parts that are damaged or missing are computed from the experts' own task vectors,
    which `streams` read. The matrices are processed in parallel on the pool of `streams`, in bounded memory; `device`
    is where they are decomposed.

    Returns:
        The names of matrices that matrix products did not make orthogonal, so that LAPACK had to.
    """
    by_lapack: list[str] = []
    names, groups = list(names), tensor_groups(plan)
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    # A checksum is written after its file.
    missing = [
        name for name in names if not (state.exists(file_name(name)) and state.exists(digest_name(file_name(name))))
    ]
    experts = range(len(plan.experts))
    keys = [(k, group) for group in sorted({group_of[name] for name in missing}) for k in experts]
    found = dict(zip(keys, streams.pool.map(lambda key: load_parts(plan, state, *key), keys), strict=True))

    def store(name: str) -> None:
        parts: dict[int, Parts] = {}
        for k in experts:
            of_group = found[k, group_of[name]]
            if of_group is not None:
                part = of_group.get(name)
            else:
                task_vector, base = streams.experts[k][1].task_vector(name), streams.base.read(name)
                part = compute_parts(plan, task_vector, base, device, partial(by_lapack.append, name))
            if part is not None:
                parts[k] = part
        with one_at_a_time(device):
            on_device = {k: (u.to(device), s.to(device), vt.to(device)) for k, (u, s, vt) in parts.items()}
            factors = _orthogonal(plan, name, on_device, partial(by_lapack.append, name))
            write = _store_factors if name in factored else _store_whole
            write(plan, state, name, factors)

    for _ in in_order(
        (partial(store, name) for name in missing), streams.pool, decompositions(plan, streams.threads) - 1
    ):
        pass
    stored = set(names)
    matrices = frozenset(decomposed(plan))
    done = (number for number, group in enumerate(groups) if not stored.isdisjoint(group))
    remove_parts(plan, state, (number for number in done if matrices.intersection(groups[number]) <= stored))
    return by_lapack


def _store_whole(plan: Plan, state: Folder, name: str, factors: Factors) -> None:
    """Write the file of one matrix: an entry `k` of the matrix's shape for each expert k that changes it."""
    shape = plan.base_header.tensors[name].shape
    products = {str(k): product for k, product in enumerate(factors.products()) if product is not None}

    def values(entry: OutputTensor) -> Iterator[Tensor]:
        product = products[entry.name]
        yield (product.left @ product.right).to(torch_dtype(entry.dtype))

    _write(state, name, [_entry(key, shape, stored_dtype(plan)) for key in products], values)


def _store_factors(plan: Plan, state: Folder, name: str, factors: Factors) -> None:
    """Write the file of one matrix: the factors of all experts, and the rank of each."""
    tensors = {"left": factors.left_mR, "right": factors.right_Rn, "ranks": torch.tensor(factors.ranks)}
    code = stored_dtype(plan)
    entries = [_entry(key, tuple(tensor.shape), "I64" if key == "ranks" else code) for key, tensor in tensors.items()]
    _write(state, name, entries, lambda entry: iter([tensors[entry.name].to(torch_dtype(entry.dtype))]))


def _write(
    state: Folder, name: str, entries: Sequence[OutputTensor], values: Callable[[OutputTensor], Iterator[Tensor]]
) -> None:
    keep_digest(state, file_name(name), write_file(state, OutputFile(file_name(name), tuple(entries)), values))


def _entry(name: str, shape: tuple[int, ...], code: str) -> OutputTensor:
    return OutputTensor(name, shape, code, math.prod(shape) * BYTES[code])


def _orthogonal(plan: Plan, name: str, parts: Mapping[int, Parts], by_lapack: Callable[[], None]) -> Factors:
    """Return the factors of all experts, from the parts of those that change the matrix.

    They are TASK_VECTOR_SCALE · U⊥·Σ [m, R] and V⊥ᵀ [R, n], or those of `swudi_parts`, or, of whole task vectors, U·Σ
    and Vᵀ. The directions of each expert are in the order of its singular values.
    """
    ranks = tuple(len(parts[k][1]) if k in parts else 0 for k in range(len(plan.experts)))
    if not plan.orthogonal or not parts:
        whole = {k: Product(u * s, vt) for k, (u, s, vt) in parts.items()}
        return Factors.of([whole.get(k) for k in range(len(ranks))], plan.base_header.tensors[name].shape)
    given = list(parts.values())
    shares = plan.config.parameters.task_vectors == "swudi"
    left, values, right = swudi_parts(given) if shares else orthogonal_parts(given, by_lapack)
    return Factors(left * (TASK_VECTOR_SCALE * values), right, ranks)


def with_orthogonal(plan: Plan, streams: TaskVectors, state: Folder | None) -> TaskVectors:
    """Return streams that read the stored task vectors of the matrices that have such.

    Returns `streams` itself if the plan has none. A file is opened at its first use and may be written until then.
    """
    names = frozenset(decomposed(plan))
    if not names:
        return streams
    assert state is not None
    files = StoredTaskVectors(state)
    experts = [(model, _OrthogonalExpert(expert, k, names, files)) for k, (model, expert) in enumerate(streams.experts)]
    return streams.over(experts)


class StoredTaskVectors:
    """The stored task vectors. Each file is opened once and kept as views, since every piece of every step reads it.

    A damaged file is removed, so that the next start of the run computes it again.
    """

    def __init__(self, state: Folder) -> None:
        self._state, self._lock = state, threading.Lock()
        self._opened: dict[str, dict[str, Tensor]] = {}

    def of(self, name: str) -> Mapping[int, TaskVector]:
        """Return τ⊥ₖ of a matrix by k, for the experts that change it."""
        tensors = self._tensors(name)
        if "ranks" in tensors:
            return {k: product for k, product in enumerate(self.factors(name).products()) if product is not None}
        return {int(k): Stored(tensor.reshape(-1)) for k, tensor in tensors.items()}

    def factors(self, name: str) -> Factors:
        """Return the factors of a matrix that was stored as such."""
        tensors = self._tensors(name)
        return Factors(tensors["left"], tensors["right"], tuple(tensors["ranks"].tolist()))

    def _tensors(self, name: str) -> Mapping[str, Tensor]:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open(file_name(name))
            return self._opened[name]

    def _open(self, stored: str) -> dict[str, Tensor]:
        with borrowed(self._state, stored) as path:
            if not has_digest(self._state, stored, LocalFolder(path.parent), path.name):
                self._state.remove(stored)
                refuse(f"{self._state.where}/{stored}")
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class _OrthogonalExpert:
    """The `ExpertWeights` of expert k with the matrices `names` read from `files`, all other tensors from `expert`."""

    def __init__(self, expert: ExpertWeights, k: int, names: frozenset[str], files: StoredTaskVectors) -> None:
        self._expert, self._k, self._names, self._files = expert, k, names, files

    def task_vector(self, name: str) -> TaskVector | None:
        return self._files.of(name).get(self._k) if name in self._names else self._expert.task_vector(name)

    def stored(self, name: str) -> Tensor | None:
        return self._expert.stored(name)
