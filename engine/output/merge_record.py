"""What a merge tells of itself beside its weights: resolved config, metrics and model card. Knows no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import yaml

from engine.learning.importance import write_importance
from engine.methods.options import Method
from engine.output.card import write_card, write_weight_space_card
from engine.output.resolved_config import located, resolved_config, versions
from engine.planning.open_models import weight_files
from engine.planning.plan import ModelPlan, Plan
from engine.task_vectors.coefficients import Array, Coefficients, write_coefficients

METRICS = pa.schema(
    [
        ("stage", pa.int8()),
        ("step", pa.int32()),
        ("model", pa.string()),
        ("sample", pa.int32()),
        ("kl", pa.float64()),
        ("hidden", pa.float64()),
        ("entropy", pa.float64()),
        ("regularization", pa.float64()),
        ("grad_norm", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
    ]
)


def input_files(plan: Plan) -> dict[str, list[str]]:
    """Every file that a result depends on, by path or URI, of each model: weights, and the samples of an expert."""
    files = {model.model: _weights(model) for model in (plan.base, plan.rows) if model is not None}
    images = plan.images or [()] * len(plan.experts)
    return files | {
        expert.name: [*_weights(expert), *(file.path for file in located(given, expert)), *seen]
        for given, expert, seen in zip(plan.config.models, plan.experts, images, strict=True)
    }


def _weights(model: ModelPlan) -> list[str]:
    return [file.address for file in weight_files(model)]


def write_record(
    folder: Path,
    plan: Plan,
    identity: str,
    digests: Mapping[str, str],
    stages: Sequence[Coefficients],
    importance_L: Array | None,
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    """The model card, and all of `merge/` but the memory figures.

    `digests` are the SHA-256 of the inputs' files; `importance_L` belongs to the layout of the last stage.
    """
    record = folder / "merge"
    names = [expert.name for expert in plan.experts]
    priors = {"priors": dict(zip(names, plan.priors, strict=True))}
    write_config(record / "config.yaml", plan, identity, _hashed(plan, digests), priors)
    write_coefficients(record / "coefficients.parquet", stages, names)
    if importance_L is not None:
        write_importance(record / "importance.parquet", stages[-1].layout, importance_L)
    write_metrics(record / "metrics.parquet", metrics)
    write_card(folder / "README.md", plan, stages[-1])


def write_weight_space_record(
    folder: Path, plan: Plan, method: Method, identity: str, digests: Mapping[str, str]
) -> None:
    """The model card and merge/config.yaml of a merge that learned nothing."""
    write_config(folder / "merge" / "config.yaml", plan, identity, _hashed(plan, digests))
    write_weight_space_card(folder / "README.md", plan, method)


def _hashed(plan: Plan, digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """model → file → SHA-256."""
    return {model: {file: digests[file] for file in files} for model, files in input_files(plan).items()}


def write_config(
    path: Path,
    plan: Plan,
    identity: str,
    inputs: Mapping[str, Mapping[str, str]],
    found: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """merge/config.yaml: the resolved config; date, versions, `inputs` (model → file → SHA-256), what was `found`."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"identity": identity, "date": date, "versions": versions(), "inputs": inputs, **found}
    text = yaml.safe_dump({**resolved_config(plan), "record": record}, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """merge/metrics.parquet: a row a sample of each optimiser step."""
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows), schema=METRICS), path)
