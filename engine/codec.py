"""How a tensor travels between processes: its bytes as a numpy array, its dtype and its shape.

Pickled as it is, a torch tensor would drag the whole storage behind a view along and be copied on both sides; an array
of bytes is sent as it lies and read in place. Every tensor that crosses a process border goes through here. Knows no
Ray.
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
    """A tensor on its way: `data` uint8 [bytes], C order."""

    data: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(self.data.nbytes)


def pack(tensor: Tensor) -> Packed:
    """The tensor, ready to travel; shares its memory where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return Packed(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))


def unpack(packed: Packed) -> Tensor:
    """The tensor as a view of what arrived, on the CPU. Others may share that memory: never write to it."""
    if not packed.nbytes:
        return torch.empty(packed.shape, dtype=packed.dtype)
    with warnings.catch_warnings():
        # What arrives is read-only, and so is what we do with it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(packed.data)
    return data.view(packed.dtype).reshape(packed.shape)


def pack_all(tensors: Mapping[Key, Tensor]) -> dict[Key, Packed]:
    """Several tensors, each as `pack` does it."""
    return {key: pack(tensor) for key, tensor in tensors.items()}


def unpack_all(packed: Mapping[Key, Packed]) -> dict[Key, Tensor]:
    """Several tensors, each as `unpack` does it."""
    return {key: unpack(one) for key, one in packed.items()}


def to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to bring a tensor to the CPU; what is returned waits for it, in whatever thread it is called.

    From a GPU the copy takes its turn among the device's work, so that whoever computes there goes on meanwhile, and
    the tensor's memory may be used again at once.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
