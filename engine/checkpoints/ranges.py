"""Ranges of tensors, read from the files as float32 without torch and without reading the rest."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.checkpoints.headers import BYTES, FLOATS, TensorHeader, read_offsets
from engine.errors import CheckpointError
from engine.packing import Packing
from engine.untrusted import open_regular

Floats = npt.NDArray[np.float32]


class Ranges:
    """The tensors of one model folder, to be read in ranges. Close it after use, or use it as a context."""

    def __init__(self, folder: Path, tensors: dict[str, TensorHeader]) -> None:
        self._folder, self._tensors = folder, tensors
        self._files: dict[str, tuple[Any, dict[str, int]]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Ranges:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, name: str, start: int, stop: int) -> Floats:
        """Return elements `start` to `stop` [N] of a flattened tensor of a float dtype, float32."""
        tensor = self._tensors[name]
        assert tensor.dtype in FLOATS
        file, offsets = self._opened(tensor.file)
        if (packed := tensor.packed) is not None:
            return packed.matrix(lambda own: self._bits(packed, own, tensor.file)).reshape(-1)[start:stop]
        size = BYTES[tensor.dtype]
        data = os.pread(file.fileno(), (stop - start) * size, offsets[name] + start * size)
        if tensor.dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(data, "<f4" if tensor.dtype == "F32" else "<f2").astype(np.float32)

    def _opened(self, name: str) -> tuple[Any, dict[str, int]]:
        """Return a file, and the first byte of each of its tensors."""
        if name not in self._files:
            path = self._folder / name
            file = self._open.enter_context(open_regular(path, None, CheckpointError))
            self._files[name] = file, read_offsets(path)
        return self._files[name]

    def _bits(self, packed: Packing, name: str, file: str) -> npt.NDArray[Any]:
        """Return codes or scales of a packed matrix."""
        shape, dtype = packed.stored[name]
        opened, offsets = self._opened(file)
        data = os.pread(opened.fileno(), math.prod(shape) * np.dtype(dtype).itemsize, offsets[name])
        return np.frombuffer(data, dtype).reshape(shape)
