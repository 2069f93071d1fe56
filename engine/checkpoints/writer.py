"""Writing safetensors files tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.headers import FLOATS
from engine.storage.folder import Folder


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file; `dtype` in safetensors' notation."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of the output, with its tensors in the order of their bytes."""

    name: str
    tensors: tuple[OutputTensor, ...]


def write_file(folder: Folder, file: OutputFile, parts: Callable[[OutputTensor], Iterable[Tensor]]) -> str:
    """Write one safetensors file with one part of one tensor in memory at a time; it appears when it is complete.

    The writer of the safetensors library needs all tensors of a file in memory. The format is the header's length
    (8 bytes, little-endian), a JSON header, and the tensors' bytes.

    Args:
        folder: The folder of the file.
        file: Name and tensors.
        parts: Returns the consecutive parts of a tensor, in its output dtype, on any device. It is called once per
            tensor, in order.

    Returns:
        The SHA-256 of the file in hexadecimal.

    Raises:
        StorageError: the file cannot be written.
    """
    encoded = header_of(file)
    digest = hashlib.sha256(encoded)
    with folder.create(file.name) as out:
        out.write(encoded)
        for entry in file.tensors:
            written = 0
            for part in parts(entry):
                value = part.cpu().contiguous().reshape(-1)
                if value.nbytes:
                    data = value.view(torch.uint8).numpy().data
                    digest.update(data)
                    written += out.write(data)
            assert written == entry.nbytes, entry.name
    return digest.hexdigest()


def header_of(file: OutputFile) -> bytes:
    """Return the first bytes of a safetensors file: the length of the header, and the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in file.tensors:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def torch_dtype(code: str) -> torch.dtype | None:
    """Return the torch dtype for the float dtype `code` of safetensors; None for a code not in FLOATS."""
    return getattr(torch, FLOATS[code]) if code in FLOATS else None
