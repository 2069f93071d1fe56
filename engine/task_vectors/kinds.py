"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# What kernels take: float32, or the bits of bfloat16.
Operand = npt.NDArray[np.float32] | npt.NDArray[np.uint16]


class TaskVector(Protocol):
    """τ of one tensor of one expert, flattened, in blocks."""

    @property
    def minus_base(self) -> bool:
        """Whether `operand` gives θₖ, from which θ₀ is yet to be subtracted; else τ itself."""

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        """Elements `start` to `stop`: the file's own memory if kernels take it, else written to `buffer_N`, float32."""

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """Write τ[start:stop] in float32 to `out_N`; `base_N` holds the base's elements there, in float32."""


class _Difference:
    minus_base = True

    def __init__(self, expert_N: Tensor) -> None:
        self._expert_N = expert_N
        self._operand_N = as_operand(expert_N) if expert_N.dtype in (torch.float32, torch.bfloat16) else None

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        if self._operand_N is not None:
            return self._operand_N[start:stop]
        return as_operand(buffer_N.copy_(self._expert_N[start:stop]))

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

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        """See `TaskVector`."""
        return as_operand(self._tau_N[start:stop])

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """See `TaskVector`."""
        out_N.copy_(self._tau_N[start:stop])


class _FromOperand:
    """A tensor that is put together in memory: θₖ first, and τ from it."""

    minus_base = True

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        raise NotImplementedError

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        self.operand(start, stop, out_N)
        out_N.sub_(base_N)


class _Padded(_FromOperand):
    """A tensor that ends before the base's does, which stands for the rest."""

    def __init__(self, expert_N: Tensor, base_N: Tensor) -> None:
        self._expert_N, self._base_N = expert_N, base_N

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        own = min(max(len(self._expert_N) - start, 0), stop - start)
        buffer_N[:own].copy_(self._expert_N[start : start + own])
        buffer_N[own:].copy_(self._base_N[start + own : stop])
        return as_operand(buffer_N)


class _Sum(_FromOperand):
    """A checkpoint's τ and that of an adapter on top of it."""

    def __init__(self, checkpoint: TaskVector, adapter: TaskVector) -> None:
        self._checkpoint, self._adapter = checkpoint, adapter

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        own = torch.empty_like(buffer_N)
        found = torch.from_numpy(self._checkpoint.operand(start, stop, own))
        own.copy_(found.view(torch.bfloat16) if found.dtype == torch.uint16 else found)
        self._adapter.block(start, stop, own, buffer_N)
        return as_operand(buffer_N.add_(own))


class Product:
    """τ as a product of two factors, [m, r] and [r, n] in float32, computed in blocks."""

    minus_base = False

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        """See `TaskVector`."""
        self.block(start, stop, buffer_N, buffer_N)
        return as_operand(buffer_N)

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
