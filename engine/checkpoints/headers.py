"""Where a model is and which tensors it has, from config and file headers alone.

Finds a model by path or hub id and reads its config.json and the headers of its safetensors files. Reads no weight and
imports no torch, so that a plan is quick and costs no memory.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from engine.checkpoints.find import check_file, check_folder
from engine.errors import CheckpointError
from engine.untrusted import JSON_BYTES, SHOWN, open_regular, parse_json, read_text, shown

# Bytes of an element; types of less than one byte are no tensors of their own in torch.
BYTES = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip


FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


# The section of a composite model's config that is its language model's: transformers' name, and that of OpenGVLab's
# original checkpoints.
TEXT_SECTIONS = ("text_config", "llm_config")


PICKLED = {".bin", ".pt", ".pth", ".ckpt"}


CONVERT = (
    "load it with transformers and save it with `save_pretrained`, which writes safetensors; pickles may hold code"
)


# Characters of a tensor's name.
NAME = 1000


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a checkpoint: `dtype` as safetensors writes it (F32, BF16, …), `file` relative to the folder."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * BYTES[self.dtype]


@dataclass(frozen=True)
class ModelHeader:
    """A model folder: its config.json and its tensors in the order of its files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: its own section in composite models, else the whole."""
        nested = (self.config.get(key) for key in TEXT_SECTIONS)
        return next((section for section in nested if isinstance(section, dict)), self.config)

    @property
    def takes_images(self) -> bool:
        """Whether the model has a part that sees."""
        return isinstance(self.config.get("vision_config"), dict)

    @property
    def architecture(self) -> str:
        """What decides whether two models are of one kind."""
        architectures = self.config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else "?"
        return f"{shown(str(first))} ({shown(str(self.config.get('model_type', '?')))})"

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens, where the config says it."""
        size = self.text_config.get("vocab_size")
        return size if type(size) is int else None

    @property
    def num_layers(self) -> int | None:
        """Number of blocks L, by any of the names that transformers' configs use."""
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if type(count := self.text_config.get(key)) is int:
                return count
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, or not a JSON object.
    """
    data = parse_json(read_text(path, JSON_BYTES, CheckpointError), str(path), CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", str(path))
    return data


def read_model_header(folder: Path) -> ModelHeader:
    """Config and tensors of a full checkpoint, one file or sharded by an index.

    Raises:
        CheckpointError: naming the file or the tensor at fault.
    """
    check_folder(folder)
    config = read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            "a quantized checkpoint has no weights to take differences of",
            str(folder),
            do="give the model in float32, bfloat16 or float16",
        )
    header = ModelHeader(folder, config, _read_tensors(folder))
    blocks = header.num_layers
    if blocks is not None and not 0 <= blocks <= len(header.tensors):
        raise CheckpointError(
            f"config.json says that there are {shown(str(blocks))} blocks",
            str(folder),
            f"no more than its {len(header.tensors)} tensors",
        )
    return header


def _read_tensors(folder: Path) -> dict[str, TensorHeader]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _read_index(index)
    single = folder / "model.safetensors"
    if single.exists():
        return read_file_header(single)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    raise CheckpointError(
        f"no safetensors weights here{f', only pickled ones ({pickled[0]})' if pickled else ''}",
        str(folder),
        "model.safetensors, or model.safetensors.index.json with the files that it names",
        CONVERT if pickled else "",
    )


def read_file_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: missing, truncated, or its header is not what safetensors allows.
    """
    from safetensors import SafetensorError, safe_open

    header = _header_text(path)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {}
            for name in file.offset_keys():
                part = file.get_slice(name)
                tensors[name] = TensorHeader(name, tuple(part.get_shape()), part.get_dtype(), path.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"not a whole safetensors file: {shown(str(error), 4 * SHOWN)}", str(path), do="fetch or save it again"
        ) from error
    # The library takes the last of two tensors of one name.
    parse_json(header, str(path), CheckpointError)
    for tensor in tensors.values():
        if len(tensor.name) > NAME:
            raise CheckpointError(f"a tensor's name has {len(tensor.name):,} characters", str(path))
        if tensor.dtype not in BYTES:
            raise CheckpointError(f"{tensor.name!r} is {tensor.dtype}", str(path), f"one of {', '.join(BYTES)}")
    return tensors


def _header_text(path: Path) -> str:
    """The JSON at the beginning of a safetensors file."""
    with open_regular(path, None, CheckpointError) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > JSON_BYTES:
            raise CheckpointError(
                f"not a whole safetensors file: a header of {length:,} bytes", str(path), f"at most {JSON_BYTES:,}"
            )
        return file.read(length).decode("utf-8", "replace")


def _read_index(index: Path) -> dict[str, TensorHeader]:
    """Tensors of a sharded checkpoint; the index decides which file each comes from."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError("the index has no `weight_map` of tensor names to file names", str(index))
    headers = {}
    for file in sorted(set(weight_map.values())):
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file:
            raise CheckpointError(f"the index names a file outside the model's folder: {shown(repr(file))}", str(index))
        path = index.parent / pure
        if not os.path.isfile(path):  # noqa: PTH113 - false, not an error, for a name that no file can have
            raise CheckpointError(f"the index names a file that is not there: {shown(repr(file))}", str(index))
        check_file(path, index.parent)
        headers[file] = read_file_header(path)
    tensors: dict[str, TensorHeader] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if weight_map.get(name) == file:
                tensors[name] = TensorHeader(name, tensor.shape, tensor.dtype, file)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"the index says that {shown(repr(weight_map[absent[0]]))} holds {shown(repr(absent[0]))}, and it does not",
            str(index),
        )
    return tensors


SAFETENSORS = {name: code for code, name in FLOATS.items()}


def main_dtype(base: ModelHeader) -> str:
    """The float type that most of the base's bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in base.tensors.values():
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.nbytes
    if not sizes:
        raise CheckpointError("no tensor is float32, bfloat16 or float16", str(base.folder))
    return sizes.most_common(1)[0][0]
