"""Where a model is and which tensors it has, from config and file headers alone.

Finds a model by path or hub id and reads its config.json and the headers of its safetensors files. Reads no weight and
imports no torch, so that a plan is quick and costs no memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import CheckpointError, InputError

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What a run reads of a hub repository: weights, tokenizer and configuration; never pickled weights or code.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


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
        """Bytes in the file; types of one byte or less count as one byte an element."""
        return self.numel * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class ModelHeader:
    """A model folder: its config.json and its tensors in the order of its files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: its own section in composite models, else the whole."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def architecture(self) -> str:
        """What decides whether two models are of one kind."""
        architectures = self.config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else "?"
        return f"{first} ({self.config.get('model_type', '?')})"

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens, where the config says it."""
        size = self.text_config.get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def num_layers(self) -> int | None:
        """Number of blocks L, by any of the names that transformers' configs use."""
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(self.text_config.get(key), int):
                return int(self.text_config[key])
        return None


def locate(path: str, folder: Path, kind: type[InputError] = InputError) -> Path:
    """The absolute path that a user means, relative to `folder`; `~` is a home.

    Raises:
        InputError: no file can have that name; `kind` says which of them.
    """
    try:
        return (folder / Path(path).expanduser()).resolve()
    except (RuntimeError, ValueError, OSError) as error:
        raise kind(f"not a path: {error}", repr(path)) from error


def find_model(model: str, config_folder: Path) -> Path:
    """The folder of a model: a path relative to the config's folder, or a hub id (`owner/name`, perhaps `@revision`).

    A hub id is fetched into huggingface_hub's cache; HF_HUB_OFFLINE=1 takes what the cache holds.

    Raises:
        CheckpointError: there is no such folder, or the hub does not give it.
    """
    path = locate(model, config_folder, CheckpointError)
    if os.path.isdir(path):  # noqa: PTH112 - false, not an error, for a name that no file can have
        return path
    hub_id, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", hub_id, flags=re.ASCII):
        raise CheckpointError("no such model folder", str(path), "a folder with config.json, or a hub id: owner/name")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"no folder of this name, and the hub does not give it: {str(error).splitlines()[0]}",
            model,
            do=f"check the path ({path}) or the id; with HF_HUB_OFFLINE=1 the model must be in the cache already",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", str(path))
    return data


def read_model_header(folder: Path) -> ModelHeader:
    """Config and tensors of a full checkpoint, one file or sharded by an index.

    Raises:
        CheckpointError: naming the file or the tensor at fault.
    """
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            "a quantized checkpoint has no weights to take differences of",
            str(folder),
            do="give the model in float32, bfloat16 or float16",
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return ModelHeader(folder, config, _read_index(index))
    single = folder / "model.safetensors"
    if single.exists():
        return ModelHeader(folder, config, read_file_header(single))
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise CheckpointError(
        f"no safetensors weights here{f', only pickled ones ({pickled[0]})' if pickled else ''}",
        str(folder),
        "model.safetensors, or model.safetensors.index.json with the files that it names",
        "save the model again with `save_pretrained`, which writes safetensors" if pickled else "",
    )


def read_file_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: missing, truncated, or its header is not what safetensors allows.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {}
            for name in file.offset_keys():
                part = file.get_slice(name)
                tensors[name] = TensorHeader(name, tuple(part.get_shape()), part.get_dtype(), path.name)
            return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"not a whole safetensors file: {error}", str(path), do="fetch or save it again"
        ) from error


def _read_index(index: Path) -> dict[str, TensorHeader]:
    """Tensors of a sharded checkpoint; the index decides which file each comes from."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError("the index has no `weight_map` of tensor names to file names", str(index))
    headers = {}
    for file in sorted(set(weight_map.values())):
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file:
            raise CheckpointError(f"the index names a file outside the model's folder: {file!r}", str(index))
        path = index.parent / pure
        if not path.is_file():
            raise CheckpointError(f"the index names a file that is not there: {file!r}", str(index))
        headers[file] = read_file_header(path)
    tensors: dict[str, TensorHeader] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if weight_map.get(name) == file:
                tensors[name] = TensorHeader(name, tensor.shape, tensor.dtype, file)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"the index says that {weight_map[absent[0]]!r} holds {absent[0]!r}, and it does not", str(index)
        )
    return tensors
