"""Conversion of tensors to and from arrays of bytes, for transport between processes.

A pickled view of a torch tensor would include the whole storage behind it, and would be copied on both sides. A numpy
array of bytes is sent without a copy and read in place. Every tensor that crosses a process boundary is packed here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Key = TypeVar("Key")


@dataclass(frozen=True)
class Packed:
    """A tensor in transport: its bytes `data` (uint8, [nbytes], C order), its dtype and its shape."""

    data: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(self.data.nbytes)


def pack(tensor: Tensor) -> Packed:
    """Return the tensor packed for transport, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return Packed(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))


def unpack(packed: Packed) -> Tensor:
    """Return the tensor as a view of the received bytes, on the CPU. Its memory may be shared: never write to it."""
    if not packed.nbytes:
        return torch.empty(packed.shape, dtype=packed.dtype)
    with warnings.catch_warnings():
        # Received arrays are read-only, and callers only read the tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(packed.data)
    return data.view(packed.dtype).reshape(packed.shape)


def pack_all(tensors: Mapping[Key, Tensor]) -> dict[Key, Packed]:
    """Return several tensors packed by `pack`, under the same keys and in the same order."""
    return {key: pack(tensor) for key, tensor in tensors.items()}


def unpack_all(packed: Mapping[Key, Packed]) -> dict[Key, Tensor]:
    """Return several tensors unpacked by `unpack`, under the same keys and in the same order."""
    return {key: unpack(value) for key, value in packed.items()}
