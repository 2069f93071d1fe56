"""What a merge has left in the `merge/` of its output folder, read again as typed data. Knows no weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pydantic
import yaml
from pydantic import Field

from engine.config.reader import parse_config
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.evaluation.results import SCHEMA
from engine.storage.cache import fetch
from engine.storage.paths import as_path, is_uri
from engine.task_vectors.coefficients import Array, Coefficients, read_coefficients
from engine.untrusted import FAULTS

FILES = ("config.yaml", "memory.json", "coefficients.parquet", "importance.parquet", "metrics.parquet")


EVALUATION = "evaluation.parquet"


# What other people's code raises over a file that is damaged.
DAMAGE: tuple[type[Exception], ...] = (*FAULTS, yaml.YAMLError)


# Losses of merge/metrics.parquet that a method may have.
LOSSES = ("kl", "hidden", "entropy")


@dataclass(frozen=True)
class Provenance:
    """What merge/config.yaml has beside the config; `priors` are those that were found on the samples."""

    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    priors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Actor:
    """One actor of merge/memory.json."""

    role: str
    pid: int
    peak_anonymous_bytes: int


@dataclass(frozen=True)
class Memory:
    """merge/memory.json."""

    actors: Annotated[tuple[Actor, ...], Field(min_length=1)]
    bytes_trainer_to_shards: int
    bytes_shards_to_trainer: int
    bytes_merged: int
    bytes_targets: int
    expert_forwards: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Importance:
    """merge/importance.parquet: of each merged tensor its elements, importance, and chunks."""

    tensors: list[str]
    numel: list[int]
    importance: Array
    chunks: list[int]


@dataclass(frozen=True)
class Curve:
    """A loss over the optimiser steps in which it was seen."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Merged:
    """A merge by what its folder says, None or empty where it has nothing; `where`: as the user named the folder."""

    where: str
    config: Config
    record: Provenance
    memory: Memory | None
    stages: dict[int, Coefficients]
    importance: Importance | None
    metrics: pa.Table | None
    evaluation: pa.Table | None

    @classmethod
    def read(cls, where: str) -> Merged:
        """A merge's output folder, by path or URI.

        Raises:
            ConfigError: there is no merge's output, or one of its files is none that a merge writes.
        """
        wanted = [f"merge/{name}" for name in (*FILES, EVALUATION)]
        path = (fetch(where, wanted, ConfigError) if is_uri(where) else as_path(where)) / "merge"
        if not (path / FILES[0]).is_file():
            raise ConfigError("no merge's output", where, f"a folder that a merge wrote, with merge/{FILES[0]} in it")
        config, record = _config(path / FILES[0])
        memory, coefficients, importance, metrics = (path / name for name in FILES[1:])
        return cls(
            where,
            config,
            record,
            _memory(memory) if memory.exists() else None,
            _stages(coefficients, config, record) if coefficients.exists() else {},
            _importance(importance) if importance.exists() else None,
            _metrics(metrics) if metrics.exists() else None,
            read_evaluation(path / EVALUATION) if (path / EVALUATION).exists() else None,
        )

    def prior(self, expert: str) -> float:
        """ᾱₖ of the expert of that name: the config's, or what was found on the samples."""
        given = next(self.config.weight(one) for one in self.config.models if one.name == expert)
        return self.record.priors[expert] if given is None else given

    def losses(self) -> dict[int, list[str]]:
        """The losses that each stage has; not one that is 0 everywhere, which takes no part."""
        if self.metrics is None:
            return {}
        parts = {stage: self._of(stage) for stage in sorted(self.metrics["stage"].unique().to_pylist())}
        return {
            stage: [loss for loss in LOSSES if pc.any(pc.not_equal(part[loss], 0)).as_py()]
            for stage, part in parts.items()
        }

    def curves(self, stage: int, loss: str) -> dict[str, Curve]:
        """Of each expert: the mean over its samples in a step."""
        mean = self._of(stage).group_by(["model", "step"]).aggregate([(loss, "mean")]).sort_by("step")
        names = self._of(stage)["model"].unique().to_pylist()
        return {name: _curve(mean.filter(pc.equal(mean["model"], name)), loss) for name in names}

    def mean_curve(self, stage: int, loss: str) -> Curve:
        """The mean over the samples of a step, whoever's they are."""
        return _curve(self._of(stage).group_by(["step"]).aggregate([(loss, "mean")]).sort_by("step"), loss)

    def first_and_last(self, stage: int, loss: str) -> dict[str, tuple[float, float]]:
        """Of each expert: the mean over its samples when each was seen first, and when last."""
        ends = [(loss, "first"), (loss, "last")]
        seen = self._of(stage).group_by(["model", "sample"], use_threads=False).aggregate(ends)
        mean = seen.group_by(["model"]).aggregate([(f"{loss}_first", "mean"), (f"{loss}_last", "mean")])
        columns = (mean["model"], mean[f"{loss}_first_mean"], mean[f"{loss}_last_mean"])
        return {name: (first, last) for name, first, last in zip(*(c.to_pylist() for c in columns), strict=True)}

    def _of(self, stage: int) -> pa.Table:
        assert self.metrics is not None
        return self.metrics.filter(pc.equal(self.metrics["stage"], stage))


def read_evaluation(path: Path) -> pa.Table:
    """A long table of what models score: model, data, metric, value, count (of examples).

    Raises:
        ConfigError: it is no such table, or has two values for one thing.
    """
    table = _table(path, SCHEMA)
    keys = list(zip(*(table[name].to_pylist() for name in ("model", "data", "metric")), strict=True))
    twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
    if twice:
        raise ConfigError(f"two values for {', '.join(twice)}", str(path), "one for each model, data and metric")
    return table


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever other people's code says of a damaged file, as an error of ours."""
    try:
        yield
    except DAMAGE as error:
        what = f"not what a merge writes: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(what, str(path), do="give a folder that is as a merge left it") from error


def _table(path: Path, schema: pa.Schema) -> pa.Table:
    with _reading(path):
        return pyarrow.parquet.read_table(path, columns=schema.names).select(schema.names).cast(schema)


def _config(path: Path) -> tuple[Config, Provenance]:
    # Not by `load_config`, whose bounds are those of what a person writes: this may name very many files.
    with _reading(path):
        raw = yaml.safe_load(path.read_bytes())
        record = pydantic.TypeAdapter(Provenance).validate_python(raw.pop("record"))
        return parse_config(raw, path), record


def _memory(path: Path) -> Memory:
    with _reading(path):
        return pydantic.TypeAdapter(Memory).validate_json(path.read_bytes())


def _stages(path: Path, config: Config, record: Provenance) -> dict[int, Coefficients]:
    with _reading(path):
        numbers = sorted(pyarrow.parquet.read_table(path, columns=["stage"])["stage"].unique().to_pylist())
        read = {number: read_coefficients(path, number) for number in numbers}
    names = [expert.name for expert in config.models]
    for models, _ in read.values():
        if models != names:
            raise ConfigError("its experts are not those of config.yaml", str(path), ", ".join(names))
    unknown = [one.name for one in config.models if config.weight(one) is None and one.name not in record.priors]
    if read and unknown:
        raise ConfigError(f"nothing tells the prior of {unknown[0]!r}", str(path), "`priors` in config.yaml's record")
    return {number: table for number, (_, table) in read.items()}


def _importance(path: Path) -> Importance:
    columns = {"tensor": pa.string(), "numel": pa.int64(), "importance": pa.float64(), "chunks": pa.int32()}
    table = _table(path, pa.schema(columns))
    names, numel, scores, chunks = (column.to_pylist() for column in table.columns)
    return Importance(names, numel, np.array(scores, dtype=np.float64), chunks)


def _metrics(path: Path) -> pa.Table:
    numbers = dict.fromkeys(("stage", "step", "sample"), pa.int64()) | dict.fromkeys(LOSSES, pa.float64())
    return _table(path, pa.schema(numbers | {"model": pa.string()}))


def _curve(rows: pa.Table, loss: str) -> Curve:
    return Curve(rows["step"].to_pylist(), rows[f"{loss}_mean"].to_pylist())
