"""What the functions of `cluster.api` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from engine.checkpoints.find import ROOT, find_model
from engine.errors import ConfigError
from engine.planning.costs.rates import Prediction
from engine.planning.plan import Plan
from engine.report.memory_file import Memory
from engine.report.merge_folder import Merged
from engine.storage.cache import fetch
from engine.storage.paths import is_uri


@dataclass(frozen=True)
class MergeResult:
    """A merge that is complete.

    Attributes:
        path: The folder of the merged model, or its URI.
        made: False if the folder held this merge already.
    """

    path: str
    made: bool = False

    @cached_property
    def _record(self) -> Merged:
        return Merged.read(self.path)

    @property
    def coefficients(self) -> pa.Table | None:
        """The learned coefficients, a row each: stage, expert, tensor, chunk, value. None without learning."""
        return self._table("coefficients")

    @property
    def importance(self) -> pa.Table | None:
        """Elements, importance and chunks of each merged tensor. None without a second stage."""
        return self._table("importance")

    @property
    def layers(self) -> pa.Table | None:
        """The coefficients of layers in closed form, with energy and residual. None if the merge computed none."""
        return self._table("layers")

    @property
    def metrics(self) -> pa.Table | None:
        """The losses of each sample in each optimiser step. None without learning."""
        return self._table("metrics")

    @property
    def evaluation(self) -> pa.Table | None:
        """The scores that `evaluate` has written into the output; None without."""
        return self._record.evaluation

    @property
    def memory(self) -> Memory | None:
        """The peak memory of each process, the bytes that were moved, and the seconds of each phase."""
        return self._record.memory

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each phase; phases overlap."""
        return dict(self.memory.seconds) if self.memory else {}

    @property
    def priors(self) -> dict[str, float]:
        """The prior of each expert, also one that `weight: auto` has found. Empty without learning."""
        return dict(self._record.record.priors)

    def model(self, **options: Any) -> Any:
        """Return the merged model, loaded by transformers. `options` are those of `from_pretrained`."""
        import transformers

        folder = find_model(self.path, ROOT)
        names = transformers.AutoConfig.from_pretrained(folder, **_trust(options)).architectures or [""]
        kind = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
        return kind.from_pretrained(folder, **options)

    def tokenizer(self, **options: Any) -> Any:
        """Return the tokenizer of the merged model. `options` are those of `from_pretrained`."""
        import transformers

        return transformers.AutoTokenizer.from_pretrained(find_model(self.path, ROOT), **options)

    def _table(self, name: str) -> pa.Table | None:
        file = f"merge/{name}.parquet"
        path = (fetch(self.path, [file], ConfigError) if is_uri(self.path) else Path(self.path)) / file
        return pyarrow.parquet.read_table(path) if path.is_file() else None


@dataclass(frozen=True, repr=False)
class PlannedMerge:
    """A merge that is planned and not made. Its text is what the command `plan` prints.

    Attributes:
        plan: The models and the tensors that are merged; of several documents, those of the last one.
        estimates: Memory in bytes and time of a learned merge; None without learning.
        text: The plan as tables.
    """

    plan: Plan
    estimates: Prediction | None
    text: str

    def __repr__(self) -> str:
        return self.text

    @property
    def seconds(self) -> float | None:
        """The estimated time of a learned merge; None without learning."""
        return self.estimates.run_seconds if self.estimates else None


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of models.

    Attributes:
        table: A row for each score: model, data, metric, value, and count (of records or tokens).
        path: The file with these rows, or its URI; None if nothing was written.
    """

    table: pa.Table
    path: str | None = None

    def value(self, model: str, data: str, metric: str) -> float:
        """Return one score.

        Raises:
            KeyError: There is none of this model, data set and metric.
        """
        for row in self.table.to_pylist():
            if (row["model"], row["data"], row["metric"]) == (model, data, metric):
                return float(row["value"])
        raise KeyError((model, data, metric))


def _trust(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key == "trust_remote_code"}
