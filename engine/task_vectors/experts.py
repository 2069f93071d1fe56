"""Experts as task vectors: full checkpoints, LoRA adapters, and a checkpoint with an adapter.

Tensors are read lazily as memory-mapped views. A view is the file's own memory, shared by all its readers, and is never
written to. Letters in tensor names: N elements of a flattened tensor, R rank of an adapter, I input and O output
features.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoints.adapters import LoraPair
from engine.checkpoints.match import NO_EXCEPTIONS, Match
from engine.checkpoints.tensors import Checkpoint
from engine.sizes import BLOCK
from engine.task_vectors.kinds import Product, TaskVector, _Difference, _Padded, _Parts, _Sum


class ExpertWeights(Protocol):
    """The weights of one expert, independent of how they are stored."""

    def task_vector(self, name: str) -> TaskVector | None:
        """Return τ of the tensor `name`, or None if it is known to be zero."""

    def stored(self, name: str) -> Tensor | None:
        """Return the tensor `name` as stored, flattened [N], or None if the expert's files do not contain it."""


class FullExpert:
    """An expert that is a full checkpoint: τ = θₖ − θ₀, with the tensors matched to the base's by `match`."""

    def __init__(self, checkpoint: Checkpoint, base: Checkpoint | None = None, match: Match = NO_EXCEPTIONS) -> None:
        self.checkpoint, self.base, self.match = checkpoint, base, match

    def task_vector(self, name: str) -> TaskVector | None:
        """Return τ of the tensor `name`, or None if the checkpoint lacks the tensor. See `ExpertWeights`."""
        if name in self.match.parts:
            return _Parts(self._parts(name))
        expert_N = self.stored(name)
        if expert_N is None:
            return None
        numel = len(expert_N) if self.base is None else self.base.tensors[name].numel
        if len(expert_N) < numel:
            assert self.base is not None
            return _Padded(expert_N, self.base.read(name).reshape(-1))
        return _Difference(expert_N[:numel])

    def stored(self, name: str) -> Tensor | None:
        """See `ExpertWeights`."""
        if name in self.match.absent:
            return None
        if name in self.match.parts:
            return torch.cat(self._parts(name))
        return self.checkpoint.read(self.match.renamed.get(name, name)).reshape(-1)

    def whole(self, name: str) -> Tensor:
        """Return the expert's own tensor `name`, flattened [N], which its files must contain."""
        tensor_N = self.stored(name)
        assert tensor_N is not None, name
        return tensor_N

    def _parts(self, name: str) -> list[Tensor]:
        """Return the parts [N] that a tensor consists of in the expert's files, as views."""
        return [self.checkpoint.read(part.name).reshape(-1)[part.start : part.stop] for part in self.match.parts[name]]


class AdapterExpert:
    """An expert that is a LoRA adapter of the base: τ = scaling · B·A (Hu et al., LoRA, arXiv 2106.09685).

    For a base tensor in `whole`, the adapter stores a weight of its own, to which the product is added.
    """

    def __init__(
        self, checkpoint: Checkpoint, pairs: Mapping[str, LoraPair], whole: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.checkpoint, self.pairs, self.whole = checkpoint, pairs, whole

    def task_vector(self, name: str) -> TaskVector | None:
        """Return τ of the tensor `name`, or None if the adapter does not change it."""
        own = _Difference(self.checkpoint.read(self.whole[name]).reshape(-1)) if name in self.whole else None
        pair = self.pairs.get(name)
        if pair is None:
            return own
        # The small factors are copied so that the product reads aligned float32 memory, whatever the file's layout.
        a_RI, b_OR = (self.checkpoint.read(factor).to(torch.float32, copy=True) for factor in (pair.a, pair.b))
        left, right = (a_RI.T.contiguous(), b_OR.T.contiguous()) if pair.transposed else (b_OR, a_RI)
        product = Product(left.mul_(pair.scaling), right)
        return product if own is None else _Sum(own, product)

    def stored(self, name: str) -> Tensor | None:
        """See `ExpertWeights`: only a whole tensor without a pair is stored."""
        if name not in self.whole or name in self.pairs:
            return None
        return self.checkpoint.read(self.whole[name]).reshape(-1)


class CheckpointWithAdapter:
    """An expert that is a full checkpoint with an adapter on top: τ = θₖ + ΔW − θ₀."""

    def __init__(self, checkpoint: FullExpert, adapter: AdapterExpert) -> None:
        self._full, self.adapter = checkpoint, adapter
        self.checkpoint = checkpoint.checkpoint

    def task_vector(self, name: str) -> TaskVector | None:
        """Return τ of the tensor `name`, or None if neither part changes it."""
        first, second = self._full.task_vector(name), self.adapter.task_vector(name)
        return _Sum(first, second) if first is not None and second is not None else first or second

    def stored(self, name: str) -> Tensor | None:
        """See `ExpertWeights`: the tensor of the checkpoint, without the adapter."""
        return self._full.stored(name)

    def whole(self, name: str) -> Tensor:
        """Return the tensor `name` of the checkpoint with the adapter merged into it, flattened [N]."""
        return applied(self._full.whole(name), self.adapter.task_vector(name))


def applied(tensor: Tensor, task_vector: TaskVector | None) -> Tensor:
    """Return a tensor plus a task vector, in the tensor's dtype; the tensor itself without one."""
    if task_vector is None:
        return tensor
    tensor_N, out_N = tensor.reshape(-1), torch.empty(tensor.numel(), dtype=tensor.dtype)
    for start in range(0, len(tensor_N), BLOCK):
        stop = min(start + BLOCK, len(tensor_N))
        base_B = tensor_N[start:stop].to(torch.float32, copy=True)
        change_B = torch.empty_like(base_B)
        task_vector.block(start, stop, base_B, change_B)
        out_N[start:stop].copy_(base_B.add_(change_B))
    return out_N.view(tensor.shape)
