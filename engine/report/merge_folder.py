"""The files in `merge/` of an output folder, read as typed data.

The folder may be someone else's: every file is a regular file of bounded size, no link leads out of the folder, and a
table has at most ROWS rows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pydantic

from engine.checkpoints.find import check_inside
from engine.config.reader import parse_config, read_recorded
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.evaluation.results import SCHEMA
from engine.learning.end_check import CERTAINTIES, END_CHECK, Distance, distances, preflight
from engine.output.names import public_config
from engine.report.memory_file import Memory
from engine.statistics.fits import FITS, LayerFit
from engine.storage.cache import fetch
from engine.storage.paths import as_path, is_uri
from engine.task_vectors.coefficients import Array, Coefficients, read_coefficients
from engine.untrusted import FAULTS, JSON_BYTES, check_regular, read_text, shown

T = TypeVar("T")
FILES = (
    *("config.yaml", "memory.json", "rounding.json"),
    *("coefficients.parquet", "importance.parquet", "metrics.parquet", "layers.parquet", "end_check.parquet"),
)
EVALUATION = "evaluation.parquet"
# Columns of merge/metrics.parquet with the losses of a method.
LOSSES = ("kl", "hidden", "entropy")
# The most rows of a table, and of a table of scores, which a page shows whole. A hundred experts of 1,000 tensors with
# 10 chunks each have two million coefficients in two stages.
ROWS, SCORES = 5_000_000, 100_000
STAGES = {1, 2}
_UNCHANGED = "give an unchanged output folder"
_SCORES = "write the scores again with `evaluate`, or leave this file out"


@dataclass(frozen=True)
class Provenance:
    """The `record` of merge/config.yaml. `priors` holds the prior of every expert, also one found by `weight: auto`."""

    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    priors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Survived:
    """The contents of merge/rounding.json: the share of the change that is left, of the merge and of each tensor."""

    rounding: str
    survived: float | None
    tensors: dict[str, float | None]


@dataclass(frozen=True)
class Importance:
    """The columns of merge/importance.parquet: elements, importance and chunks of each merged tensor."""

    tensors: list[str]
    numel: list[int]
    importance: Array
    chunks: list[int]


@dataclass(frozen=True)
class Curve:
    """The values of a loss, and the optimiser steps at which they were measured."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Merged:
    """A merge as recorded in its output folder. A file that does not exist leaves its attribute None or empty.

    `where` is the folder as the user gave it. `config` names models and files without the folders that they are in.
    """

    where: str
    config: Config
    record: Provenance
    memory: Memory | None
    survived: Survived | None
    stages: dict[int, Coefficients]
    importance: Importance | None
    metrics: pa.Table | None
    fits: dict[str, LayerFit]
    checked: list[Distance]
    doubts: list[str]
    evaluation: pa.Table | None

    @classmethod
    def read(cls, where: str) -> Merged:
        """Read the output folder of a merge, given by path or URI.

        Raises:
            ConfigError: the folder is not the output of a merge, or one of its files is damaged or a link out of it.
        """
        wanted = [f"merge/{name}" for name in (*FILES, EVALUATION)]
        folder = fetch(where, wanted, ConfigError) if is_uri(where) else as_path(where)
        for path in (folder / name for name in wanted if os.path.lexists(folder / name)):
            check_inside(path, folder, ConfigError)
        path = folder / "merge"
        if not os.path.isfile(path / FILES[0]):  # noqa: PTH113 - false, not an error, for a name that no file can have
            raise ConfigError("not the output of a merge", where, f"a folder that contains merge/{FILES[0]}")
        config, record = _config(path / FILES[0])
        memory, rounding, coefficients, importance, metrics, layers, checked = (path / name for name in FILES[1:])
        return cls(
            where,
            config,
            record,
            _json(memory, Memory) if os.path.lexists(memory) else None,
            _json(rounding, Survived) if os.path.lexists(rounding) else None,
            _stages(coefficients, config, record) if os.path.lexists(coefficients) else {},
            _importance(importance) if os.path.lexists(importance) else None,
            _metrics(metrics) if os.path.lexists(metrics) else None,
            _fits(layers, config) if os.path.lexists(layers) else {},
            *_end_check(checked),
            read_evaluation(path / EVALUATION) if os.path.lexists(path / EVALUATION) else None,
        )

    def prior(self, expert: str) -> float:
        """Return the prior ᾱₖ of an expert by name, from the config or, with `weight: auto`, from the record."""
        given = next(self.config.weight(one) for one in self.config.models if one.name == expert)
        return self.record.priors[expert] if given is None else given

    def losses(self) -> dict[int, list[str]]:
        """Return the losses of each stage, without those that are 0 everywhere."""
        if self.metrics is None:
            return {}
        parts = {stage: self._of(stage) for stage in sorted(self.metrics["stage"].unique().to_pylist())}
        return {
            stage: [loss for loss in LOSSES if pc.any(pc.not_equal(part[loss], 0)).as_py()]
            for stage, part in parts.items()
        }

    def curves(self, stage: int, loss: str) -> dict[str, Curve]:
        """Return a curve per expert: the mean loss over its samples in each step."""
        mean = self._of(stage).group_by(["model", "step"]).aggregate([(loss, "mean")]).sort_by("step")
        names = self._of(stage)["model"].unique().to_pylist()
        return {name: _curve(mean.filter(pc.equal(mean["model"], name)), loss) for name in names}

    def mean_curve(self, stage: int, loss: str) -> Curve:
        """Return the curve of the mean loss over all samples of each step."""
        return _curve(self._of(stage).group_by(["step"]).aggregate([(loss, "mean")]).sort_by("step"), loss)

    def first_and_last(self, stage: int, loss: str) -> dict[str, tuple[float, float]]:
        """Return, per expert, the mean loss over its samples at the first and at the last visit of each sample."""
        ends = [(loss, "first"), (loss, "last")]
        seen = self._of(stage).group_by(["model", "sample"], use_threads=False).aggregate(ends)
        mean = seen.group_by(["model"]).aggregate([(f"{loss}_first", "mean"), (f"{loss}_last", "mean")])
        columns = (mean["model"], mean[f"{loss}_first_mean"], mean[f"{loss}_last_mean"])
        return {name: (first, last) for name, first, last in zip(*(c.to_pylist() for c in columns), strict=True)}

    def distances(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Return, by loss and expert, the mean loss at the start and at the end of all learning.

        The start is the first visit of each of the expert's samples in the first stage, and the end the last visit in
        the last stage.
        """
        losses = self.losses()
        if not losses:
            return {}
        first, last = min(losses), max(losses)
        found = {}
        for loss in losses[last]:
            start, end = self.first_and_last(first, loss), self.first_and_last(last, loss)
            pairs = {name: (start[name][0], end[name][1]) for name in end if name in start}
            found[loss] = {name: (_or_nan(one), _or_nan(other)) for name, (one, other) in pairs.items()}
        return found

    def _of(self, stage: int) -> pa.Table:
        assert self.metrics is not None
        return self.metrics.filter(pc.equal(self.metrics["stage"], stage))


def read_evaluation(path: Path) -> pa.Table:
    """Read a long table of scores with the columns model, data, metric, value, count (of examples) and expert.

    The last is null in files of version 0.1.0, which lack it.

    Raises:
        ConfigError: the file is damaged, or has two values for one model, data set and metric.
    """
    table = _table(path, SCHEMA, SCORES, _SCORES, ("expert",))
    keys = Counter(zip(*(table[name].to_pylist() for name in ("model", "data", "metric")), strict=True))
    twice = next((key for key, times in keys.items() if times > 1), None)
    if twice:
        raise ConfigError(
            f"two values for {shown(', '.join(map(str, twice)))}",
            str(path),
            "one value for each model, data set and metric",
        )
    return table


@contextmanager
def _reading(path: Path, do: str = _UNCHANGED) -> Iterator[None]:
    """Raise ConfigError, naming the file, for any exception that a library raises for a damaged file."""
    try:
        yield
    except FAULTS as error:
        cause = shown(str(error).splitlines()[0] if str(error) else "", 300)
        what = f"the file is damaged: {type(error).__name__}: {cause}"
        raise ConfigError(what, str(path), do=do) from error


def _check_table(path: Path, most: int = ROWS, do: str = _UNCHANGED) -> None:
    """Check that a parquet file is a regular file of at most `most` rows, which its footer tells."""
    check_regular(path, None, ConfigError)
    with _reading(path, do):
        rows = pyarrow.parquet.read_metadata(path).num_rows
    if rows > most:
        raise ConfigError(f"the file has {rows:,} rows", str(path), f"at most {most:,}")


def _table(
    path: Path, schema: pa.Schema, most: int = ROWS, do: str = _UNCHANGED, later: tuple[str, ...] = ()
) -> pa.Table:
    """Return the columns of a schema. `later`: columns that files of earlier versions lack."""
    _check_table(path, most, do)
    with _reading(path, do):
        table = pyarrow.parquet.read_table(path, columns=schema.names)
        for name in set(later).difference(table.column_names):
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
        return table.select(schema.names).cast(schema)


def _config(path: Path) -> tuple[Config, Provenance]:
    raw = read_recorded(path)
    with _reading(path):
        record = pydantic.TypeAdapter(Provenance).validate_python(raw.pop("record"))
        return public_config(parse_config(raw, path)), record


def _json(path: Path, kind: type[T]) -> T:
    """Return the contents of a JSON file, which must be those of a dataclass."""
    text = read_text(path, JSON_BYTES, ConfigError)
    with _reading(path):
        return pydantic.TypeAdapter(kind).validate_json(text)


def _stages(path: Path, config: Config, record: Provenance) -> dict[int, Coefficients]:
    _check_table(path)
    with _reading(path):
        numbers = pyarrow.parquet.read_table(path, columns=["stage"])["stage"].unique().to_pylist()
        if not set(numbers) <= STAGES:
            raise ConfigError("there are other stages than 1 and 2", str(path))
        numbers.sort()
        read = {number: read_coefficients(path, number) for number in numbers}
    names = [expert.name for expert in config.models]
    for models, _ in read.values():
        if models != names:
            raise ConfigError("the experts differ from those in config.yaml", str(path), shown(", ".join(names), 300))
    unknown = [one.name for one in config.models if config.weight(one) is None and one.name not in record.priors]
    if read and unknown:
        raise ConfigError(
            f"the prior of {shown(repr(unknown[0]))} is missing", str(path), "`priors` in the record of config.yaml"
        )
    return {number: table for number, (_, table) in read.items()}


def _importance(path: Path) -> Importance:
    columns = {"tensor": pa.string(), "numel": pa.int64(), "importance": pa.float64(), "chunks": pa.int32()}
    table = _table(path, pa.schema(columns))
    names, numel, scores, chunks = (column.to_pylist() for column in table.columns)
    return Importance(names, numel, np.array(scores, dtype=np.float64), chunks)


def _metrics(path: Path) -> pa.Table:
    numbers = dict.fromkeys(("stage", "step", "sample"), pa.int64()) | dict.fromkeys(LOSSES, pa.float64())
    table = _table(path, pa.schema(numbers | {"model": pa.string()}))
    if not set(table["stage"].unique().to_pylist()) <= STAGES:
        raise ConfigError("there are other stages than 1 and 2", str(path))
    return table


def _fits(path: Path, config: Config) -> dict[str, LayerFit]:
    """Return the fits of merge/layers.parquet: of each layer a row for every expert, in the order of the config."""
    table, names = _table(path, FITS), [expert.name for expert in config.models]
    tensors, models, alphas, energies, residuals = (column.to_pylist() for column in table.columns)
    firsts, count = tensors[:: len(names)], len(names)
    alike = [one for one in firsts for _ in names] == tensors and models == names * len(firsts)
    if not alike or any(column.null_count for column in table.columns) or len({*firsts}) < len(firsts):
        raise ConfigError(
            "the rows are not one for each layer and expert of config.yaml", str(path), shown(", ".join(names), 300)
        )
    places = range(0, len(tensors), count)
    return {tensors[at]: LayerFit(tuple(alphas[at : at + count]), energies[at], residuals[at]) for at in places}


def _end_check(path: Path) -> tuple[list[Distance], list[str]]:
    """Return how near the merge is to each expert, and what spoke against it before it began."""
    table = _table(path, END_CHECK, later=CERTAINTIES) if os.path.lexists(path) else END_CHECK.empty_table()
    return distances(table), preflight(table)


def _curve(rows: pa.Table, loss: str) -> Curve:
    return Curve(rows["step"].to_pylist(), rows[f"{loss}_mean"].to_pylist())


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
