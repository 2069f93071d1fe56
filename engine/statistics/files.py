"""The files of a model's statistics: safetensors with moments, and of gradients, and statistics.json.

`statistics.json` says of which base, model and data they are, by SHA-256, so that they can be published with a model,
and lists each file with its SHA-256. A Gram matrix is stored as its upper triangle, row by row; layers with the same
input (query, key and value; gate and up) share an entry. Letters: N tokens, I input features.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoints.headers import BYTES
from engine.checkpoints.writer import OutputFile, OutputTensor, write_file
from engine.errors import CheckpointError
from engine.fields import Int, Section
from engine.statistics.moments import Moments, TensorStatistics
from engine.storage.cache import borrowed
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.untrusted import JSON_BYTES, shown

HEADER = "statistics.json"
AGAIN = "compute the statistics with `python cli.py stats` again, those of the base with --base"
# Rows of a Gram matrix that are packed or unpacked at a time.
ROWS = 256

FileName = Annotated[str, Field(pattern=r"^(moments|fisher|sensitivity)-[0-9]{5}\.safetensors$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Form = Literal["gram", "inputs", "diagonal"]
Count = Annotated[Int, Field(ge=0)]


class MomentsEntry(Section):
    """Where the moments of a layer's inputs are.

    Attributes:
        file: The file.
        key: The start of the names in it; the layers that share an input share it.
        tokens: N.
        features: I.
        form: What there is besides the diagonals: the Gram matrix, the inputs, or nothing.
    """

    file: FileName
    key: str
    tokens: Count
    features: Count
    form: Form


class StatisticsHeader(Section):
    """The content of statistics.json.

    Attributes:
        format: The version of the format.
        base: SHA-256 of the base's weight files, by name.
        model: Those of the expert, or of the base itself.
        data: SHA-256 of the samples.
        sequences: The number of samples.
        tokens: Their tokens.
        dtype: The dtype of the model when it ran.
        kinds: What was collected.
        moments: Where the moments are, by the tensor's name in the checkpoint.
        fisher: The file of each tensor's Fisher information.
        sensitivity: The file of each tensor's sensitivity.
        files: SHA-256 of each file, by name.
    """

    format: Literal[1] = 1
    base: dict[str, Sha256]
    model: dict[str, Sha256]
    data: Sha256
    sequences: Count
    tokens: Count
    dtype: str
    kinds: tuple[Literal["activations", "gram", "fisher", "sensitivity"], ...]
    moments: dict[str, MomentsEntry] = Field(default_factory=dict)
    fisher: dict[str, FileName] = Field(default_factory=dict)
    sensitivity: dict[str, FileName] = Field(default_factory=dict)
    files: dict[FileName, Sha256] = Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _has_what_it_says(self) -> StatisticsHeader:
        """Refuse a header that lacks what its kinds say, or names files that it does not list.

        A model without linear layers (GPT-2 has others) has no moments.
        """
        diagonal = any(entry.form == "diagonal" for entry in self.moments.values())
        lacks = {"gram": diagonal, "fisher": not self.fisher, "sensitivity": not self.sensitivity}
        if missing := [kind for kind in self.kinds if lacks.get(kind)]:
            raise ValueError(f"it has no {missing[0]}")
        named = {entry.file for entry in self.moments.values()} | {*self.fisher.values(), *self.sensitivity.values()}
        if unlisted := sorted(named - self.files.keys()):
            raise ValueError(f"{unlisted[0]} is not in files")
        return self


class StatisticsWriter:
    """Writes the statistics of one model into a folder, a group of tensors a file, and statistics.json last."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._moments: dict[str, MomentsEntry] = {}
        self._fisher: dict[str, str] = {}
        self._sensitivity: dict[str, str] = {}
        self._files: dict[str, str] = {}

    def moments(self, collected: Sequence[tuple[Sequence[str], Moments]]) -> None:
        """Write the moments of some layers' inputs to one file. Each has the names of the weights that share them."""
        if not collected:
            return
        file, parts = self._next("moments"), dict[str, tuple[Tensor, Moments]]()
        for names, moments in collected:
            form: Form = "gram" if moments.gram_II is not None else "diagonal"
            form = form if moments.inputs_NI is None else "inputs"
            features = len(moments.square_I)
            entry = MomentsEntry(file=file, key=names[0], tokens=moments.tokens, features=features, form=form)
            self._moments |= dict.fromkeys(names, entry)
            named = {"square": moments.square_I, "absolute": moments.absolute_I}
            named |= {"gram": moments.gram_II} if moments.gram_II is not None else {}
            named |= {"inputs": moments.inputs_NI} if moments.inputs_NI is not None else {}
            parts |= {f"{names[0]}.{what}": (tensor, moments) for what, tensor in named.items()}
        entries = [_entry(name, _stored_shape(name, tensor)) for name, (tensor, _) in parts.items()]

        def rows(entry: OutputTensor) -> Iterator[Tensor]:
            tensor = parts[entry.name][0]
            return packed(tensor) if entry.name.endswith(".gram") else iter([tensor.float()])

        self._files[file] = write_file(self._folder, OutputFile(file, tuple(entries)), rows)

    def fisher(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the Fisher information of some tensors, float32, to one file."""
        self._fisher |= dict.fromkeys(tensors, self._whole("fisher", tensors))

    def sensitivity(self, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the sensitivity of some tensors, mean square and median, float32, to one file."""
        parts = {f"{name}.square": square for name, (square, _) in tensors.items()}
        parts |= {f"{name}.median": median for name, (_, median) in tensors.items()}
        self._sensitivity |= dict.fromkeys(tensors, self._whole("sensitivity", parts))

    def _whole(self, kind: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors to one file, float32, and return its name; no file without tensors."""
        file = self._next(kind)
        entries = tuple(_entry(name, tuple(tensor.shape)) for name, tensor in tensors.items())
        if entries:
            self._files[file] = write_file(
                self._folder, OutputFile(file, entries), lambda entry: iter([tensors[entry.name].float()])
            )
        return file

    def finish(self, **facts: Any) -> StatisticsHeader:
        """Write statistics.json with the other fields of `StatisticsHeader`, and return it."""
        header = StatisticsHeader(
            moments=self._moments, fisher=self._fisher, sensitivity=self._sensitivity, files=self._files, **facts
        )
        self._folder.write(HEADER, header.model_dump_json(indent=1).encode())
        return header

    def _next(self, kind: str) -> str:
        return f"{kind}-{len(self._files):05}.safetensors"


def read_header(folder: Folder) -> StatisticsHeader:
    """Read statistics.json.

    Raises:
        CheckpointError: It is missing, no regular file, or not valid.
    """
    where = f"{folder.where}/{HEADER}"
    if not folder.exists(HEADER):  # nor is a pipe or a device, which may have no end
        inside = folder.path.glob(f"*/{HEADER}") if isinstance(folder, LocalFolder) else []
        one = min((path.parent.name for path in inside), default=None)
        do = AGAIN if one is None else f"name the folder of one model, such as {one}"
        raise CheckpointError("there are no statistics", folder.where, f"a folder with the file {HEADER}", do)
    size = folder.size(HEADER)
    if size > JSON_BYTES:
        raise CheckpointError(f"the file has {size:,} bytes", where, f"at most {JSON_BYTES:,} bytes", AGAIN)
    try:
        return StatisticsHeader.model_validate_json(folder.read(HEADER))
    except pydantic.ValidationError as error:
        (fault, *_) = error.errors(include_url=False)
        place = "".join(f"{part}." for part in fault["loc"]).removesuffix(".")
        what = f"{shown(place)}: {fault['msg']}" if place else fault["msg"]
        raise CheckpointError(f"not a header of statistics: {what}", where, do=AGAIN) from error


class Statistics:
    """The statistics of one model in a folder. A file is opened, and compared with its SHA-256, when first needed.

    Raises:
        CheckpointError: (also of the tensors' methods) a file is missing, damaged, or has other tensors than expected.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self.header = folder, read_header(folder)
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()

    def of(self, name: str, shape: Sequence[int]) -> TensorStatistics:
        """Return the statistics of a tensor of this shape."""
        return _OfTensor(self, name, tuple(shape))

    def read(self, file: str, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a float32 tensor of a file, which must have this shape and be finite."""
        where = f"{self.folder.where}/{file}"
        with self._lock:
            if file not in self._opened:
                self._opened[file] = self._open(file, where)
            opened = self._opened[file]
        try:
            tensor: Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"the file has no tensor {shown(name)}", where, do=AGAIN) from error
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            what = f"{shown(name)} is {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise CheckpointError(what, where, f"float32 of shape {shape}", AGAIN)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{shown(name)} has a NaN or infinite value", where, do=AGAIN)
        return tensor

    def _open(self, file: str, where: str) -> Any:
        try:
            if not self.folder.exists(file):
                raise FileNotFoundError(file)
            with borrowed(self.folder, file) as path:
                if LocalFolder(path.parent).digest(path.name) != self.header.files.get(file):
                    raise CheckpointError("the file is not the one that statistics.json lists", where, do=AGAIN)
                return safe_open(path, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:
            raise CheckpointError("a file of the statistics is missing or invalid", where, do=AGAIN) from error


@dataclass(frozen=True)
class _OfTensor:
    """See `TensorStatistics`."""

    statistics: Statistics
    name: str
    shape: tuple[int, ...]

    @property
    def sequences(self) -> int:
        return self.statistics.header.sequences

    @property
    def tokens(self) -> int:
        entry = self.statistics.header.moments.get(self.name)
        return 0 if entry is None else entry.tokens

    def moments(self) -> Moments | None:
        entry = self.statistics.header.moments.get(self.name)
        if entry is None:
            return None
        features = entry.features
        if self.shape[1:] != (features,):
            what = f"the layer of {shown(self.name)} has {features:,} inputs"
            where = f"{self.statistics.folder.where}/{HEADER}"
            raise CheckpointError(what, where, f"those of a weight of shape {self.shape}", AGAIN)

        def read(what: str, *shape: int) -> Tensor:
            return self.statistics.read(entry.file, f"{entry.key}.{what}", shape)

        gram = unpacked(read("gram", features * (features + 1) // 2), features) if entry.form == "gram" else None
        inputs = read("inputs", entry.tokens, features) if entry.form == "inputs" else None
        return Moments(entry.tokens, read("square", features), read("absolute", features), gram, inputs)

    def fisher(self) -> Tensor | None:
        file = self.statistics.header.fisher.get(self.name)
        return None if file is None else self.statistics.read(file, self.name, self.shape)

    def sensitivity(self, part: Literal["square", "median"]) -> Tensor | None:
        file = self.statistics.header.sensitivity.get(self.name)
        return None if file is None else self.statistics.read(file, f"{self.name}.{part}", self.shape)


def packed(gram_II: Tensor) -> Iterator[Tensor]:
    """Yield the upper triangle of a symmetric matrix, row by row, in parts."""
    for start in range(0, len(gram_II), ROWS):
        rows = gram_II[start : start + ROWS]
        yield rows[torch.ones_like(rows, dtype=torch.bool).triu(start)]


def unpacked(triangle: Tensor, features: int) -> Tensor:
    """Return the symmetric matrix [I, I] of the triangle that `packed` yields."""
    gram_II, taken = torch.empty(features, features), 0
    for start in range(0, features, ROWS):
        rows = gram_II[start : start + ROWS]
        mask = torch.ones_like(rows, dtype=torch.bool).triu(start)
        count = int(mask.sum())
        rows[mask] = triangle[taken : taken + count]
        taken += count
        square = rows[:, start : start + len(rows)]
        square.copy_(square.triu() + square.triu(1).T)
        gram_II[start + len(rows) :, start : start + len(rows)] = rows[:, start + len(rows) :].T
    return gram_II


def _entry(name: str, shape: tuple[int, ...]) -> OutputTensor:
    return OutputTensor(name, shape, "F32", math.prod(shape) * BYTES["F32"])


def _stored_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    features = len(tensor)
    return (features * (features + 1) // 2,) if name.endswith(".gram") else tuple(tensor.shape)
