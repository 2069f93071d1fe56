"""config.json and the tensor headers of safetensors files, one or many with an index.

No weight is read and torch is not imported, so that a plan takes little time and memory.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from engine.checkpoints.find import check_file, check_folder
from engine.checkpoints.structure import Role, by_names
from engine.errors import CheckpointError
from engine.packing import Packing
from engine.untrusted import JSON_BYTES, SHOWN, open_regular, parse_json, read_text, shown

# Bytes of an element by dtype. Types of less than one byte are missing, because torch has no tensors of them.
BYTES = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip

# Names of float dtypes: safetensors → torch, and torch → safetensors.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SAFETENSORS = {name: code for code, name in FLOATS.items()}

# Keys of the language model's section in a composite config: of transformers, and of OpenGVLab's original checkpoints.
TEXT_SECTIONS = ("text_config", "llm_config")

# Suffixes of pickled weights, and the advice for them.
PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
CONVERT = (
    "load it with transformers and save it with `save_pretrained`, which writes safetensors; pickles may contain code"
)

# Weights in one file, or the index of those in several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Maximum characters of a tensor's name.
NAME = 1000


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a checkpoint: `dtype` in safetensors' notation (F32, BF16, …), `file` relative to the folder.

    With `packed`, it is computed from other tensors of the file, and `dtype` is F32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    packed: Packing | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * BYTES[self.dtype] if self.packed is None else self.packed.nbytes


@dataclass(frozen=True)
class ModelHeader:
    """A model folder: its config.json, and its tensors in the order of files and of bytes in them.

    Attributes:
        folder: The folder.
        config: The content of config.json.
        tensors: The tensors by name.
        roles: The tensors that are not ordinary weights: by their names, until `engine.planning` knows better.
        notes: What a user should know about the folder, such as files that are not used.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    roles: Mapping[str, Role] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The language model's config: a section of a composite model's config, else the whole config."""
        sections = (self.config.get(key) for key in TEXT_SECTIONS)
        return next((section for section in sections if isinstance(section, dict)), self.config)

    @property
    def takes_images(self) -> bool:
        """Whether the model takes images: its config has a vision section."""
        return isinstance(self.config.get("vision_config"), dict)

    @property
    def architecture(self) -> str:
        """Class and model type, which must agree between the models of a merge."""
        architectures = self.config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else "?"
        return f"{shown(str(first))} ({shown(str(self.config.get('model_type', '?')))})"

    def is_same_architecture(self, other: ModelHeader) -> bool:
        """Return whether two models have the same type; their classes decide if a config.json does not name its type.

        `architectures` may be null, or name the class of a wrapper.
        """
        types = self.config.get("model_type"), other.config.get("model_type")
        if all(isinstance(one, str) for one in types):
            return types[0] == types[1]
        return self.architecture == other.architecture

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens in the config, None if it gives none."""
        size = self.text_config.get("vocab_size")
        return size if type(size) is int else None

    @property
    def num_layers(self) -> int | None:
        """Number of transformer blocks L, under any of the keys that configs use; None if there is none."""
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"):
            if type(count := self.text_config.get(key)) is int:
                return count
        kinds = self.text_config.get("layers_block_type")
        return len(kinds) if isinstance(kinds, list) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable, or not a JSON object.
    """
    data = parse_json(read_text(path, JSON_BYTES, CheckpointError), str(path), CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", str(path))
    return data


def read_model_header(folder: Path) -> ModelHeader:
    """Read config and tensor headers of a full checkpoint, of one file or of several with an index.

    Raises:
        CheckpointError: a file is missing or invalid, the weights are pickled or quantized, or the number of blocks is
            not plausible.
    """
    check_folder(folder)
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        _refuse_checkpoints(folder)
    config = read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    classes = config.get("architectures")
    if classes is not None and not isinstance(classes, list):
        raise CheckpointError(
            f"`architectures` is {shown(repr(classes))}", str(folder / "config.json"), "a list of names, or null"
        )
    tensors = _read_tensors(folder)
    header = ModelHeader(folder, config, tensors, by_names(tensors)[0].roles, _notes(folder))
    # The types of the tensors decide: a merge into 16 bits often leaves the section in config.json.
    if config.pop("quantization_config", None) and (codes := _codes(header)):
        raise CheckpointError(
            f"the checkpoint is quantized ({codes[0]!r} is {tensors[codes[0]].dtype}); task vectors are differences of "
            "float weights",
            str(folder),
            do="use the model in float32, bfloat16 or float16",
        )
    blocks = header.num_layers
    if blocks is not None and not 0 <= blocks <= len(header.tensors):
        raise CheckpointError(
            f"config.json gives {shown(str(blocks))} blocks",
            str(folder),
            f"at least 0, and at most one block per tensor ({len(header.tensors)} tensors)",
        )
    return header


def _codes(header: ModelHeader) -> list[str]:
    """Return the tensors of a checkpoint whose type is one of quantized weights; counts and masks have others."""
    plain = {*FLOATS, "F64", "I64", "BOOL"}
    return [name for name, tensor in header.tensors.items() if tensor.dtype not in plain]


def _refuse_checkpoints(folder: Path) -> None:
    """Refuse a trainer's output folder that has checkpoints but no model of its own, by the names of these.

    Raises:
        CheckpointError: it is such a folder.
    """
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    if numbers:
        last = f"checkpoint-{max(numbers)}"
        raise CheckpointError(
            f"no weights in this folder, only the checkpoints of a training ({len(numbers)}, the last is {last})",
            str(folder),
            do=f"name one of them: {folder / last}",
        )


def _notes(folder: Path) -> tuple[str, ...]:
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        return (f"{SINGLE} is read, as by transformers; {INDEX} beside it is not used and may be of older weights",)
    return ()


def _read_tensors(folder: Path) -> dict[str, TensorHeader]:
    # In this order, as transformers.
    if (folder / SINGLE).exists():
        return read_file_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _read_index(folder / INDEX)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    raise CheckpointError(
        f"no safetensors weights in this folder{f', only pickled ones ({pickled[0]})' if pickled else ''}",
        str(folder),
        "model.safetensors, or model.safetensors.index.json and the files that it lists",
        CONVERT if pickled else "",
    )


def read_file_header(path: Path) -> dict[str, TensorHeader]:
    """Read the tensor headers of one safetensors file, in the order of the tensors' bytes.

    Raises:
        CheckpointError: the file is missing or truncated, or its header is invalid.
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
            f"not a valid safetensors file: {shown(str(error), 4 * SHOWN)}", str(path), do="download or save it again"
        ) from error
    # Repeated keys are refused: of two tensors with one name, the library would silently use the last.
    parse_json(header, str(path), CheckpointError)
    for tensor in tensors.values():
        if len(tensor.name) > NAME:
            raise CheckpointError(
                f"a tensor's name has {len(tensor.name):,} characters", str(path), f"at most {NAME:,}"
            )
        if tensor.dtype not in BYTES:
            what = f"the tensor {tensor.name!r} has dtype {tensor.dtype}"
            raise CheckpointError(what, str(path), f"one of {', '.join(BYTES)}")
    return tensors


def read_offsets(path: Path) -> dict[str, int]:
    """Return the first byte of each tensor in a safetensors file that `read_file_header` has accepted."""
    text = _header_text(path)
    first = 8 + len(text.encode())
    entries = parse_json(text, str(path), CheckpointError)
    return {name: first + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}


def _header_text(path: Path) -> str:
    """Return the JSON header of a safetensors file as text."""
    with open_regular(path, None, CheckpointError) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > JSON_BYTES:
            raise CheckpointError(
                f"not a valid safetensors file: a header of {length:,} bytes",
                str(path),
                f"at most {JSON_BYTES:,} bytes",
            )
        return file.read(length).decode("utf-8", "replace")


def _read_index(index: Path) -> dict[str, TensorHeader]:
    """Read the tensor headers of a checkpoint in several files. The index decides from which file a tensor is read."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError("the index has no `weight_map` from tensor names to file names", str(index))
    headers = {}
    for file in sorted(set(weight_map.values())):
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file:
            raise CheckpointError(f"the index names a file outside the model's folder: {shown(repr(file))}", str(index))
        path = index.parent / pure
        if not os.path.isfile(path):  # noqa: PTH113 - returns False, not an error, for impossible names
            raise CheckpointError(f"the index names a missing file: {shown(repr(file))}", str(index))
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
            f"the file {shown(repr(weight_map[absent[0]]))} lacks the tensor {shown(repr(absent[0]))}",
            str(index),
            "the tensors that the index assigns to each file",
        )
    return tensors


def main_dtype(base: ModelHeader) -> str:
    """Return torch's name of the float dtype that most of the base's bytes have, such as `bfloat16`.

    Raises:
        CheckpointError: the base has no float32, bfloat16 or float16 tensor.
    """
    sizes: Counter[str] = Counter()
    for tensor in base.tensors.values():
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.nbytes
    if not sizes:
        raise CheckpointError("the model has no float32, bfloat16 or float16 tensor", str(base.folder))
    return sizes.most_common(1)[0][0]
