"""Conversion of tensors to and from arrays of bytes, for transport between processes.

A pickled view of a torch tensor would include the whole storage behind it, and would be copied on both sides. A numpy
array of bytes is sent without a copy and read in place. Every tensor that crosses a process boundary is packed here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
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


def to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a copy of the tensor to the CPU, and return a function that waits for it and returns it.

    The function may be called from any thread. From a GPU, the copy is queued on its current stream: the caller's
    computation goes on meanwhile, and later work on that stream may overwrite the tensor. A tensor on the CPU is
    returned as it is.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    # On the stream of the tensor's own device, which need not be the current one; a thread that waits leaves its core.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
