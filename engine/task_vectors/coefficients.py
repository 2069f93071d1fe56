"""The table of coefficients αₖ,ₗ,ₛ: its chunk layout, its sigmoid parametrisation and its parquet file.

Values are float64 in the trainer (a few thousand numbers) and float32 in merges and files.
Letters in array names: K experts, C coefficients of one expert, m chunks of one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from engine.errors import RunError

Array = npt.NDArray[np.float64]

SCHEMA = pa.schema(
    [
        ("stage", pa.int8()),
        ("model", pa.string()),
        ("tensor", pa.string()),
        ("chunk", pa.int32()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("value", pa.float32()),
        ("learned", pa.bool_()),
    ]
)
# Key of the file's metadata with the tensors whose chunks of stage 2 are groups of singular directions, as JSON.
SPECTRAL = b"spectral"


def chunk_edges(numel: int, chunks: int) -> tuple[int, ...]:
    """Return the first element of each chunk of a flattened tensor (or its first direction), followed by `numel`.

    Chunks are contiguous and have ⌈nₗ/mₗ⌉ elements, the last one possibly fewer. There are fewer than `chunks` chunks
    if chunks of that size cover the tensor earlier (Expert Merging++, arXiv 2509.25712).
    """
    assert numel > 0 and chunks > 0
    size = math.ceil(numel / chunks)
    return (*range(0, numel, size), numel)


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks of the merged tensors: per tensor its edges, and whether its coefficients are learned or fixed.

    The columns of one expert's coefficients run over the tensors in order, and over the chunks within each tensor.
    A chunk is a range of the flattened tensor or, for tensors in `spectral`, of the singular directions of each
    expert's task vector, the largest first. Then edges count directions. An expert with fewer directions than the last
    edge does not use the coefficients of the chunks beyond.
    """

    tensors: tuple[str, ...]
    edges: tuple[tuple[int, ...], ...]
    learned: tuple[bool, ...]
    spectral: frozenset[str] = frozenset()

    @classmethod
    def make(
        cls,
        numels: Mapping[str, int],
        chunks: Mapping[str, int],
        directions: Mapping[str, int] = MappingProxyType({}),
    ) -> ChunkLayout:
        """Return the layout for mₗ chunks per tensor; 0 chunks mean one coefficient that is fixed.

        `directions` are the numbers of singular directions of the tensors whose chunks are groups of these.
        """
        tensors = tuple(numels)
        edges = tuple(chunk_edges(directions.get(name, numels[name]), max(1, chunks[name])) for name in tensors)
        return cls(tensors, edges, tuple(chunks[name] > 0 for name in tensors), frozenset(directions))

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Columns of the coefficients, by tensor name."""
        starts = np.concatenate([[0], np.cumsum([len(edges) - 1 for edges in self.edges])]).tolist()
        return {name: slice(starts[i], starts[i + 1]) for i, name in enumerate(self.tensors)}

    @cached_property
    def learned_columns(self) -> npt.NDArray[np.bool_]:
        """Mask of the learned columns, [C]."""
        return np.repeat(np.array(self.learned), [len(edges) - 1 for edges in self.edges])

    @cached_property
    def edges_of(self) -> dict[str, tuple[int, ...]]:
        """Chunk edges, by tensor name."""
        return dict(zip(self.tensors, self.edges, strict=True))

    @property
    def width(self) -> int:
        """Number of coefficients of one expert (C), fixed ones included."""
        return sum(len(edges) - 1 for edges in self.edges)


@dataclass(frozen=True)
class TensorCoefficients:
    """The coefficients of one merged tensor: `edges` of its m chunks and `values` [K, m], float32.

    `spectral`: the chunks are groups of singular directions, see `ChunkLayout`.
    """

    edges: tuple[int, ...]
    values: npt.NDArray[np.float32]
    spectral: bool = False

    def of_directions(self, expert: int, count: int) -> npt.NDArray[np.float32]:
        """Return the coefficients of the first `count` singular directions of an expert, [count]."""
        assert self.spectral and count <= self.edges[-1]
        return np.repeat(self.values[expert], np.diff(self.edges))[:count]


@dataclass(frozen=True)
class Coefficients:
    """A chunk layout with its values [K, C], float64."""

    layout: ChunkLayout
    values: Array

    @classmethod
    def constant(cls, layout: ChunkLayout, weights: Sequence[float]) -> Coefficients:
        """Set every coefficient of expert k to `weights[k]`: Task Arithmetic, and the start of learning."""
        return cls(layout, np.repeat(np.array(weights, dtype=np.float64)[:, None], layout.width, axis=1))

    def of(self, tensor: str) -> TensorCoefficients:
        """Return the coefficients of one merged tensor."""
        values = self.values[:, self.layout.columns[tensor]].astype(np.float32)
        return TensorCoefficients(self.layout.edges_of[tensor], values, tensor in self.layout.spectral)

    def same_as(self, other: Coefficients) -> bool:
        """Return whether layout and values are identical, so that both tables merge to the same bits."""
        return self.layout == other.layout and np.array_equal(self.values, other.values)

    def per_tensor(self) -> Array:
        """Return the mean over the chunks of each tensor, Σₛ αₖ,ₗ,ₛ / mₗ, [K, tensors]."""
        columns = self.layout.columns
        return np.stack([self.values[:, columns[name]].mean(axis=1) for name in self.layout.tensors], axis=1)

    def spread(self, layout: ChunkLayout) -> Coefficients:
        """Return a table in another layout with the mean of each tensor in all its chunks (`start: stage1`)."""
        repeats = [len(edges) - 1 for edges in layout.edges]
        return Coefficients(layout, np.repeat(self.per_tensor(), repeats, axis=1))


def sigmoid(a: Array) -> Array:
    """Return σ(a) = 1 / (1 + e⁻ᵃ)."""
    return np.asarray(1.0 / (1.0 + np.exp(-a)))


def logit(alpha: Array) -> Array:
    """Return a = ln(α / (1 − α)) for 0 < α < 1."""
    return np.asarray(np.log(alpha) - np.log1p(-alpha))


def write_coefficients(path: Path, stages: Sequence[Coefficients], models: Sequence[str]) -> None:
    """Write merge/coefficients.parquet: one row per coefficient, stage after stage.

    `start` and `end` of a chunk count elements or, in the tensors that the metadata lists in stage 2, directions.
    """
    rows = [row for stage, table in enumerate(stages, start=1) for row in _rows(stage, table, models)]
    columns = [pa.array(column, type=field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
    spectral = sorted(stages[-1].layout.spectral) if stages else []
    schema = SCHEMA.with_metadata({SPECTRAL: json.dumps(spectral)}) if spectral else SCHEMA
    pyarrow.parquet.write_table(pa.table(columns, schema=schema), path)


def read_coefficients(path: Path, stage: int) -> tuple[list[str], Coefficients]:
    """Read the model names and the coefficients of one stage (1 or 2) from merge/coefficients.parquet.

    Raises:
        RunError: the file does not contain the stage.
    """
    table = pyarrow.parquet.read_table(path, schema=SCHEMA, filters=[("stage", "==", stage)])
    if not table.num_rows:
        raise RunError(f"the file has no stage {stage}", str(path))
    models = table["model"].unique().to_pylist()
    first = table.filter(pc.equal(table["model"], models[0])).to_pylist()
    tensors = tuple(dict.fromkeys(row["tensor"] for row in first))
    edges: dict[str, list[int]] = {name: [] for name in tensors}
    learned = {}
    for row in first:
        edges[row["tensor"]].append(row["start"])
        learned[row["tensor"]] = row["learned"]
    ends = {row["tensor"]: row["end"] for row in first}
    listed = json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(SPECTRAL, b"[]")) if stage == 2 else []
    layout = ChunkLayout(
        tensors,
        tuple((*edges[name], ends[name]) for name in tensors),
        tuple(learned[name] for name in tensors),
        frozenset(tensors).intersection(listed),
    )
    values = table["value"].to_numpy().astype(np.float64).reshape(len(models), layout.width)
    return models, Coefficients(layout, values)


def _rows(stage: int, table: Coefficients, models: Sequence[str]) -> Iterator[tuple[object, ...]]:
    for k, model in enumerate(models):
        values = iter(table.values[k])
        for name, edges, learned in zip(table.layout.tensors, table.layout.edges, table.layout.learned, strict=True):
            for chunk, (start, end) in enumerate(pairwise(edges)):
                yield stage, model, name, chunk, start, end, next(values), learned
