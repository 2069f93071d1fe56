"""Weights, lazily: tensors by name as memory-mapped views, and task vectors of an expert block by block.

What is read is never written to: a view is the file's own memory, shared by all who read it. Knows no models, only
names. Letters in tensor names: N elements of a flattened tensor, R rank of an adapter.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from engine.headers import ROOT, ModelHeader, TensorHeader, find_model
from engine.lora import WEIGHTS, AdapterHeader, LoraPair
from engine.matching import NO_EXCEPTIONS, Match
from engine.plan import ExpertPlan, ModelPlan, Plan
from engine.vocabulary import rows_in


class Checkpoint:
    """Tensors of one model folder by their names in its files."""

    def __init__(self, folder: Path, tensors: dict[str, TensorHeader]) -> None:
        self.folder, self.tensors = folder, tensors
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the file's memory, on the CPU, in the file's dtype. Never write to it."""
        file = self.tensors[name].file
        with self._lock:
            if file not in self._files:
                self._files[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            tensor: Tensor = self._files[file].get_tensor(name)
        return tensor


class BaseWithRows(Checkpoint):
    """The base with the tokens of another model: rows that it lacks are that model's, rows beyond them are cut."""

    def __init__(self, base: Checkpoint, donor: Checkpoint, donor_header: ModelHeader) -> None:
        super().__init__(base.folder, base.tensors)
        self._donor, self._donor_header = donor, donor_header
        self._filled: dict[str, Tensor] = {}
        self._filling = threading.Lock()

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`; a tensor that is filled up is a copy of its own, made once."""
        tensor, shape = super().read(name), self.tensors[name].shape
        if tensor.shape == shape:
            return tensor
        with self._filling:
            if name not in self._filled:
                more = self._donor.read(rows_in(self._donor_header, name))[len(tensor) :].to(tensor.dtype)
                self._filled[name] = torch.cat([tensor, more])[: shape[0]]
            return self._filled[name]


# What kernels take: float32, or the bits of bfloat16.
Operand = npt.NDArray[np.float32] | npt.NDArray[np.uint16]


class TaskVector(Protocol):
    """τ of one tensor of one expert, flattened, in blocks."""

    @property
    def minus_base(self) -> bool:
        """Whether `operand` gives θₖ, from which θ₀ is yet to be subtracted; else τ itself."""

    def operand(self, start: int, stop: int, room_N: Tensor) -> Operand:
        """Elements `start` to `stop`: the file's own memory if kernels take it, else written to `room_N`, float32."""

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """Write τ[start:stop] in float32 to `out_N`; `base_N` holds the base's elements there, in float32."""


class Expert(Protocol):
    """The weights of one expert, whatever they are stored as."""

    def task_vector(self, name: str) -> TaskVector | None:
        """τ of the tensor `name`; None where it is known to be zero."""

    def stored(self, name: str) -> Tensor | None:
        """The tensor as its file has it, flattened; None where it has none of its own."""


class FullExpert:
    """An expert that is a full checkpoint: τ = θₖ − θ₀, of the tensors that `match` says are the base's."""

    def __init__(self, checkpoint: Checkpoint, base: Checkpoint | None = None, match: Match = NO_EXCEPTIONS) -> None:
        self.checkpoint, self.base, self.match = checkpoint, base, match

    def task_vector(self, name: str) -> TaskVector | None:
        """τ of the tensor `name`, read from both files as it is asked for; None where it has no such tensor."""
        expert_N = self.stored(name)
        if expert_N is None:
            return None
        numel = len(expert_N) if self.base is None else self.base.tensors[name].numel
        if len(expert_N) < numel:
            assert self.base is not None
            return _Padded(expert_N, self.base.read(name).reshape(-1))
        return _Difference(expert_N[:numel])

    def stored(self, name: str) -> Tensor | None:
        """See `Expert`."""
        if name in self.match.absent:
            return None
        return self.checkpoint.read(self.match.renamed.get(name, name)).reshape(-1)


class AdapterExpert:
    """An expert that is a LoRA adapter of the base: τ = scaling · B·A, never written to a file."""

    def __init__(self, checkpoint: Checkpoint, pairs: dict[str, LoraPair]) -> None:
        self.checkpoint, self.pairs = checkpoint, pairs

    def task_vector(self, name: str) -> TaskVector | None:
        """τ of the tensor `name`; None where the adapter does not change it."""
        pair = self.pairs.get(name)
        if pair is None:
            return None
        # Copies of the small factors, so that the product reads aligned float32 memory whatever the file's layout.
        a_RI, b_OR = (self.checkpoint.read(factor).to(torch.float32, copy=True) for factor in (pair.a, pair.b))
        left, right = (a_RI.T.contiguous(), b_OR.T.contiguous()) if pair.transposed else (b_OR, a_RI)
        return Product(left.mul_(pair.scaling), right)

    def stored(self, name: str) -> Tensor | None:
        """See `Expert`."""
        return None


class _Difference:
    minus_base = True

    def __init__(self, expert_N: Tensor) -> None:
        self._expert_N = expert_N
        self._operand_N = as_operand(expert_N) if expert_N.dtype in (torch.float32, torch.bfloat16) else None

    def operand(self, start: int, stop: int, room_N: Tensor) -> Operand:
        if self._operand_N is not None:
            return self._operand_N[start:stop]
        return as_operand(room_N.copy_(self._expert_N[start:stop]))

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        expert_N = self._expert_N[start:stop]
        if expert_N.dtype == torch.float32:
            torch.sub(expert_N, base_N, out=out_N)
        else:
            out_N.copy_(expert_N).sub_(base_N)


class Stored:
    """τ as it stands in memory or a file, flattened, float32 or bfloat16."""

    minus_base = False

    def __init__(self, tau_N: Tensor) -> None:
        self._tau_N = tau_N

    def operand(self, start: int, stop: int, room_N: Tensor) -> Operand:
        """See `TaskVector`."""
        return as_operand(self._tau_N[start:stop])

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """See `TaskVector`."""
        out_N.copy_(self._tau_N[start:stop])


class _FromOperand:
    """A tensor that is put together in memory: θₖ first, and τ from it."""

    minus_base = True

    def operand(self, start: int, stop: int, room_N: Tensor) -> Operand:
        raise NotImplementedError

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        self.operand(start, stop, out_N)
        out_N.sub_(base_N)


class _Padded(_FromOperand):
    """A tensor that ends before the base's does, which stands for the rest."""

    def __init__(self, expert_N: Tensor, base_N: Tensor) -> None:
        self._expert_N, self._base_N = expert_N, base_N

    def operand(self, start: int, stop: int, room_N: Tensor) -> Operand:
        own = min(max(len(self._expert_N) - start, 0), stop - start)
        room_N[:own].copy_(self._expert_N[start : start + own])
        room_N[own:].copy_(self._base_N[start + own : stop])
        return as_operand(room_N)


class _Sum(_FromOperand):
    """A checkpoint's τ and that of an adapter on top of it."""

    def __init__(self, checkpoint: TaskVector, adapter: TaskVector) -> None:
        self._checkpoint, self._adapter = checkpoint, adapter

    def operand(self, start: int, stop: int, room_N: Tensor) -> Operand:
        own = torch.empty_like(room_N)
        found = torch.from_numpy(self._checkpoint.operand(start, stop, own))
        own.copy_(found.view(torch.bfloat16) if found.dtype == torch.uint16 else found)
        self._adapter.block(start, stop, own, room_N)
        return as_operand(room_N.add_(own))


class CheckpointWithAdapter:
    """An expert that is a full checkpoint and an adapter of it: τ = θₖ + ΔW − θ₀."""

    def __init__(self, checkpoint: FullExpert, adapter: AdapterExpert) -> None:
        self._checkpoint, self._adapter = checkpoint, adapter

    def task_vector(self, name: str) -> TaskVector | None:
        """τ of the tensor `name`; None where neither changes it."""
        first, second = self._checkpoint.task_vector(name), self._adapter.task_vector(name)
        return _Sum(first, second) if first is not None and second is not None else first or second

    def stored(self, name: str) -> Tensor | None:
        """See `Expert`."""
        return self._checkpoint.stored(name)


class Product:
    """τ as a product of two factors, [m, r] and [r, n] in float32, computed in blocks."""

    minus_base = False

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def operand(self, start: int, stop: int, room_N: Tensor) -> Operand:
        """See `TaskVector`."""
        self.block(start, stop, room_N, room_N)
        return as_operand(room_N)

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """See `TaskVector`."""
        columns = self._right.shape[1]
        first, last = start // columns, -(-stop // columns)
        if start == first * columns and stop == last * columns:
            torch.mm(self._left[first:last], self._right, out=out_N.view(last - first, columns))
        else:
            rows = self._left[first:last] @ self._right
            out_N.copy_(rows.reshape(-1)[start - first * columns : stop - first * columns])


def as_operand(tensor_N: Tensor) -> Operand:
    """The memory of a float32 or bfloat16 tensor on the CPU, as kernels take it."""
    return (tensor_N.view(torch.uint16) if tensor_N.dtype == torch.bfloat16 else tensor_N).numpy()


def open_base(plan: Plan) -> Checkpoint:
    """The base's weights, found by the plan's words on whatever node this is."""
    base = Checkpoint(_folder(plan.base), plan.base_header.tensors)
    if plan.rows is None:
        return base
    assert isinstance(plan.rows.header, ModelHeader)
    return BaseWithRows(base, Checkpoint(_folder(plan.rows), plan.rows.header.tensors), plan.rows.header)


def open_expert(expert: ExpertPlan, base: Checkpoint | None = None) -> Expert:
    """An expert's weights, against those of the base where they may be of another size."""
    if isinstance(expert.header, AdapterHeader):
        return _open_adapter(expert, expert.header)
    full = FullExpert(Checkpoint(_folder(expert), expert.header.tensors), base, expert.match)
    if expert.adapter is None:
        return full
    assert isinstance(expert.adapter.header, AdapterHeader)
    return CheckpointWithAdapter(full, _open_adapter(expert.adapter, expert.adapter.header))


def _open_adapter(model: ModelPlan, header: AdapterHeader) -> AdapterExpert:
    return AdapterExpert(Checkpoint(_folder(model), header.tensors), header.pairs)


def weight_files(model: ModelPlan) -> list[Path]:
    """The files that hold the model's weights."""
    if isinstance(model, ExpertPlan) and model.adapter is not None:
        return [*weight_files(ModelPlan(model.model, model.header)), *weight_files(model.adapter)]
    if isinstance(model.header, ModelHeader):
        return [_folder(model) / file for file in sorted({tensor.file for tensor in model.header.tensors.values()})]
    return [_folder(model) / WEIGHTS]


def _folder(model: ModelPlan) -> Path:
    return find_model(model.model, ROOT)
