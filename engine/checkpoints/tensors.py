"""Tensors of a model folder, read on demand from memory-mapped files."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from engine.checkpoints.headers import TensorHeader


class Checkpoint:
    """Tensors of one model folder, by their names in its files. Files are opened when first needed."""

    def __init__(self, folder: Path, tensors: dict[str, TensorHeader]) -> None:
        self.folder, self.tensors = folder, tensors
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """Return the tensor as a view of the memory-mapped file, on the CPU, in the file's dtype. Never write to it.

        A packed one is computed.
        """
        header = self.tensors[name]
        if header.packed is None:
            return self._stored(name, header.file)
        return torch.from_numpy(header.packed.matrix(lambda own: _bits(self._stored(own, header.file))))

    def _stored(self, name: str, file: str) -> Tensor:
        with self._lock:
            if file not in self._files:
                self._files[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            tensor: Tensor = self._files[file].get_tensor(name)
        return tensor


class ComputedTensors(Checkpoint):
    """Tensors that a function returns, such as those of a checkpoint with an adapter, or of several checkpoints.

    A tensor is kept as long as a caller holds it, so that it is computed once for all who use it at a time.

    Args:
        folder: The folder that provides the files beside the weights.
        tensors: Headers of the tensors.
        compute: Returns the tensor of a name.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorHeader], compute: Callable[[str], Tensor]) -> None:
        super().__init__(folder, tensors)
        self._compute = compute
        self._held: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._locks = {name: threading.Lock() for name in tensors}

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        with self._locks[name]:
            tensor = self._held.get(name)
            if tensor is None:
                tensor = self._held[name] = self._compute(name)
            return tensor


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return codes, or the bits of scales."""
    found: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found
