"""The kinds of task vectors: a difference of two files, a product of factors, stored values, a padded tensor, a sum.

Letters in tensor names: N elements of a flattened tensor, or of a range of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Input array of a kernel: float32, or the bits of bfloat16.
Operand = npt.NDArray[np.float32] | npt.NDArray[np.uint16]


class TaskVector(Protocol):
    """τ of one tensor of one expert, flattened and read in blocks."""

    @property
    def minus_base(self) -> bool:
        """Whether `operand` returns θₖ, from which the kernel subtracts θ₀; otherwise it returns τ itself."""

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        """Return elements `start` to `stop` [N] as kernel input.

        This is the file's memory if a kernel can read its dtype; otherwise the elements are written to `buffer_N`
        [N], float32, and the buffer is returned.
        """

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """Write τ[start:stop] to `out_N` [N], float32; `base_N` [N] are the base's elements of that range, float32."""


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
    """τ as a flattened tensor [N] in memory or in a file, float32 or bfloat16."""

    minus_base = False

    def __init__(self, tau_N: Tensor) -> None:
        self._tau_N = tau_N

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        """See `TaskVector`."""
        return as_operand(self._tau_N[start:stop])

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """See `TaskVector`."""
        out_N.copy_(self._tau_N[start:stop])


class FromOperand:
    """A task vector whose `block` is computed as its operand θₖ minus θ₀."""

    minus_base = True

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        """See `TaskVector`."""
        raise NotImplementedError

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """See `TaskVector`."""
        self.operand(start, stop, out_N)
        out_N.sub_(base_N)


class _Padded(FromOperand):
    """τ of a tensor with fewer elements than the base's; the base's elements fill the rest, where τ is zero."""

    def __init__(self, expert_N: Tensor, base_N: Tensor) -> None:
        self._expert_N, self._base_N = expert_N, base_N

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        count = min(max(len(self._expert_N) - start, 0), stop - start)
        buffer_N[:count].copy_(self._expert_N[start : start + count])
        buffer_N[count:].copy_(self._base_N[start + count : stop])
        return as_operand(buffer_N)


class _Parts(FromOperand):
    """τ of a tensor that the expert's files hold in parts, one after the other."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        first = 0
        for part_N in self._parts:
            low, high = max(start, first), min(stop, first + len(part_N))
            if low < high:
                buffer_N[low - start : high - start].copy_(part_N[low - first : high - first])
            first += len(part_N)
        return as_operand(buffer_N)


class _Sum(FromOperand):
    """τ of a checkpoint plus τ of an adapter on top of it."""

    def __init__(self, checkpoint: TaskVector, adapter: TaskVector) -> None:
        self._checkpoint, self._adapter = checkpoint, adapter

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        expert_N = torch.empty_like(buffer_N)
        operand_N = torch.from_numpy(self._checkpoint.operand(start, stop, expert_N))
        expert_N.copy_(operand_N.view(torch.bfloat16) if operand_N.dtype == torch.uint16 else operand_N)
        self._adapter.block(start, stop, expert_N, buffer_N)
        return as_operand(buffer_N.add_(expert_N))


class Product:
    """τ as the product of two factors, `left` [m, r] and `right` [r, n], computed block by block in float32.

    With `scale_r` [r], float32, each column of `left` is multiplied by its number.
    """

    minus_base = False

    def __init__(self, left: Tensor, right: Tensor, scale_r: Tensor | None = None) -> None:
        self.left, self.right, self._scale_r = left, right, scale_r

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        """See `TaskVector`."""
        self.block(start, stop, buffer_N, buffer_N)
        return as_operand(buffer_N)

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        """See `TaskVector`."""
        columns = self.right.shape[1]
        first, last = start // columns, -(-stop // columns)
        left, right = self.left[first:last].float(), self.right.float()
        if self._scale_r is not None:
            left = left * self._scale_r
        if start == first * columns and stop == last * columns:
            torch.mm(left, right, out=out_N.view(last - first, columns))
        else:
            rows = left @ right
            out_N.copy_(rows.reshape(-1)[start - first * columns : stop - first * columns])


def as_operand(tensor_N: Tensor) -> Operand:
    """Return the memory of a float32 or bfloat16 CPU tensor as a kernel's input array."""
    return (tensor_N.view(torch.uint16) if tensor_N.dtype == torch.bfloat16 else tensor_N).numpy()
