"""A part of the house that has no words of its own yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.headers import FLOATS
from engine.storage.folder import Folder


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file: `dtype` as safetensors writes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of the output."""

    name: str
    tensors: tuple[OutputTensor, ...]


def write_file(folder: Folder, file: OutputFile, parts: Callable[[OutputTensor], Iterable[Tensor]]) -> None:
    """Write one safetensors file, asking for its tensors one after the other, each in parts; no two are held at once.
    It is there whole or not at all.

    The library's own writer wants all of a file's tensors in memory. The format is a length, a JSON header, the bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in file.tensors:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with folder.create(file.name) as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in file.tensors:
            written = 0
            for part in parts(entry):
                value = part.contiguous().reshape(-1)
                if value.nbytes:
                    written += out.write(value.view(torch.uint8).numpy().data)
            assert written == entry.nbytes, entry.name


def torch_dtype(code: str) -> torch.dtype | None:
    """The torch type of a float that safetensors calls `code`; None for what is no float of ours."""
    return getattr(torch, FLOATS[code]) if code in FLOATS else None
