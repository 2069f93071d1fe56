"""The leading singular parts of an expert's matrices, stored in the run's state until they are made orthogonal.

The tensors of the base are divided into groups, the same for every expert. A survey of an expert
(`engine.shards.survey`) stores two files per group: the parts of its matrices, and a sealed record with the magnitudes
of its task vectors and the checksum of the file of parts. The record is written last.
Letters: m rows and n columns of a matrix, r rank, K experts.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoints.writer import OutputFile, OutputTensor, write_file
from engine.errors import DamagedError, InputError
from engine.methods.arithmetic.matrices import Parts, leading, leading_parts
from engine.planning.factors import decomposed
from engine.planning.plan import Plan
from engine.sizes import ELEMENTS_PER_GROUP, MATRICES_PER_CALL
from engine.storage.cache import borrowed
from engine.storage.folder import Folder
from engine.storage.local_folder import digest
from engine.storage.sealed import read_sealed, refuse, write_sealed
from engine.task_vectors.kinds import Product, TaskVector
from engine.task_vectors.sums import whole
from engine.untrusted import parse_json

# Subfolders of the run's state.
PARTS, SURVEY = "parts", "survey"
SIDES = ("left", "values", "right")

_gpu = threading.Lock()


@dataclass(frozen=True)
class Surveyed:
    """What the survey of one expert found in one group of tensors.

    Attributes:
        magnitudes: mean |τ| of each tensor of the group.
        parts: SHA-256 of the file of parts; empty if the group has no matrix that is made orthogonal.
        digests: With the last group, the SHA-256 of each of the expert's weight files, by path or URI.
    """

    magnitudes: tuple[float, ...]
    parts: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


def tensor_groups(plan: Plan) -> list[tuple[str, ...]]:
    """Return the names of the base's tensors in the order of its files, in groups of one call's work."""
    decomposed_names, groups = frozenset(decomposed(plan)), list[list[str]]()
    matrices = elements = 0
    for name, tensor in plan.base_header.tensors.items():
        if not groups or matrices == MATRICES_PER_CALL or elements >= ELEMENTS_PER_GROUP:
            groups.append([])
            matrices = elements = 0
        groups[-1].append(name)
        matrices, elements = matrices + (name in decomposed_names), elements + tensor.numel
    return [tuple(group) for group in groups]


def parts_file(expert: int, group: int) -> str:
    """Return the file of an expert's leading parts in the run's state."""
    return f"{PARTS}/{expert}-{group}.safetensors"


def record_file(expert: int, group: int) -> str:
    """Return the file of the record of an expert's survey in the run's state."""
    return f"{SURVEY}/{expert}-{group}.json"


def compute_parts(
    plan: Plan,
    task_vector: TaskVector | None,
    base: Tensor,
    device: torch.device,
    by_lapack: Callable[[], None] | None = None,
) -> Parts | None:
    """Return the leading ⌊min(m, n)/K⌋ parts of an expert's matrix on the CPU, None if it equals the base's.

    They are computed on `device`. `base` is on the CPU. `by_lapack`: see `leading`.
    """
    # The parts of whole task vectors are those of adapters, of a lower rank.
    rank = max(1, min(base.shape) // (len(plan.experts) if plan.orthogonal else 1))
    if device.type == "cpu":
        parts = leading_parts(task_vector, base, rank, by_lapack)
    elif isinstance(task_vector, Product):
        with one_at_a_time(device):
            moved = Product(task_vector.left.to(device), task_vector.right.to(device))
            parts = leading_parts(moved, base, rank)
    elif task_vector is None:
        return None
    else:
        tau = whole(task_vector, base)
        with one_at_a_time(device):
            parts = leading(tau.to(device), rank, by_lapack) if tau.any() else None
    if parts is None:
        return None
    # Copies, so that the full factors can be freed.
    u, s, vt = (part.clone() if device.type == "cpu" else part.cpu() for part in parts)
    return u, s, vt


@contextmanager
def one_at_a_time(device: torch.device) -> Iterator[None]:
    """Let one thread compute on a GPU at a time, which bounds its memory; on a CPU any number."""
    if device.type == "cpu":
        yield
        return
    with _gpu:
        yield


def store_group(
    state: Folder,
    expert: int,
    group: int,
    magnitudes: Sequence[float],
    parts: Mapping[int, Parts] | None,
    digests: Mapping[str, str],
) -> Surveyed:
    """Write the files of a surveyed group.

    Args:
        state: The run's state.
        expert: The expert's index.
        group: The group's index.
        magnitudes: mean |τ| of each tensor of the group.
        parts: The parts by the tensor's place in the group; None if no tensor of the group is made orthogonal.
        digests: With the last group, the SHA-256 of the expert's files.
    """
    sha256 = ""
    if parts is not None:
        tensors = {
            f"{place}.{side}": tensor
            for place, of_matrix in parts.items()
            for side, tensor in zip(SIDES, of_matrix, strict=True)
        }
        entries = tuple(OutputTensor(name, tuple(t.shape), "F32", 4 * t.numel()) for name, t in tensors.items())
        file = OutputFile(parts_file(expert, group), entries)
        sha256 = write_file(state, file, lambda entry: [tensors[entry.name]])
    found = Surveyed(tuple(magnitudes), sha256, digests)
    write_sealed(state, record_file(expert, group), json.dumps(asdict(found)).encode())
    return found


def load_surveyed(state: Folder, expert: int, group: int, tensors: int) -> Surveyed | None:
    """Return the record of a surveyed group that has this number of tensors, or None if there is none.

    Raises:
        DamagedError: the record is damaged.
    """
    name = record_file(expert, group)
    where = f"{state.where}/{name}"
    try:
        content = read_sealed(state, name)
    except FileNotFoundError:
        return None
    try:
        raw = parse_json(content.decode(), where, InputError)
        found = Surveyed(tuple(map(float, raw["magnitudes"])), str(raw["parts"]), dict(raw["digests"]))
    except (InputError, ValueError, TypeError, KeyError, AttributeError):
        refuse(where)
    known = all(isinstance(text, str) for pair in found.digests.items() for text in pair)
    if len(found.magnitudes) != tensors or not all(map(math.isfinite, found.magnitudes)) or not known:
        refuse(where)
    return found


def load_parts(plan: Plan, state: Folder, expert: int, group: int) -> dict[str, Parts] | None:
    """Return the stored parts of an expert's matrices by name, as views of the file; None if it is damaged or missing.

    Matrices that the expert does not change are not among them.
    """
    names, stored = tensor_groups(plan)[group], parts_file(expert, group)
    try:
        found = load_surveyed(state, expert, group, len(names))
        if found is None or not state.exists(stored):
            return None
        with borrowed(state, stored) as path:
            if digest(path) != found.parts:
                return None
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        places = sorted({int(key.partition(".")[0]) for key in tensors})
        parts = {names[place]: _parts_of(tensors, place) for place in places}
    except (FileNotFoundError, DamagedError, InputError, SafetensorError, ValueError, KeyError, IndexError):
        return None
    fit = all(_fits(some, plan.base_header.tensors[name].shape) for name, some in parts.items())
    return parts if fit else None


def _parts_of(tensors: Mapping[str, Tensor], place: int) -> Parts:
    left, values, right = (tensors[f"{place}.{side}"] for side in SIDES)
    return left, values, right


def _fits(parts: Parts, shape: Sequence[int]) -> bool:
    """Return whether these can be the parts of a matrix of this shape."""
    (left, values, right), rank = parts, len(parts[1]) if parts[1].dim() == 1 else -1
    return (
        (left.shape, right.shape) == ((shape[0], rank), (rank, shape[-1]))
        and all(part.dtype == torch.float32 for part in parts)
        and bool(values.isfinite().all())
    )


def remove_parts(plan: Plan, state: Folder, groups: Iterable[int]) -> None:
    """Remove the stored parts of all experts in these groups."""
    for group in groups:
        for k in range(len(plan.experts)):
            state.remove(parts_file(k, group))
