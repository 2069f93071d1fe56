"""The record of a merge: resolved config, coefficients, importance and metrics in `merge/`, and the model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import yaml

from engine.config.documents import with_models
from engine.learning.importance import write_importance
from engine.methods.options import Method
from engine.output.card import PICTURE, write_card, write_weight_space_card
from engine.output.picture import draw_coefficients
from engine.output.resolved_config import resolved_config, versions
from engine.planning.open_models import weight_files
from engine.planning.plan import ModelPlan, Plan
from engine.statistics.fits import NO_FITS, Fits, write_fits
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.coefficients import Array, Coefficients, write_coefficients

# Files that are written after all others: the record itself, the list of files, figures and the report.
LAST_FILES = tuple(
    f"merge/{name}"
    for name in ("config.yaml", "files.json", "identity.json", "memory.json", "report.html", "rounding.json")
)
STATISTICS_FILES = tuple(f"merge/{name}" for name in ("config.yaml", "files.json", "identity.json"))
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
    """Return the files that the result depends on, as paths or URIs by model: weights, calibration files, images."""
    files = {plan.base.model: _weights(plan.base)}
    images = plan.images or [()] * len(plan.experts)
    return files | {
        expert.name: [*_weights(expert), *(file.path for file in expert.located(given)), *seen]
        for given, expert, seen in zip(plan.config.models, plan.experts, images, strict=True)
    }


def _weights(model: ModelPlan) -> list[str]:
    return [file.address for file in weight_files(model)]


def write_record(
    folder: Path,
    plan: Plan,
    identity: bytes,
    digests: Mapping[str, str],
    stages: Sequence[Coefficients],
    importance_L: Array | None,
    metrics: Sequence[Mapping[str, Any]],
    weights: Sequence[str] = (),
    devices: Mapping[str, Any] | None = None,
    fits: Fits = NO_FITS,
    checked: pa.Table | None = None,
) -> None:
    """Write the model card and all files of `merge/` except memory.json, rounding.json and report.html.

    Args:
        folder: The output folder.
        plan: The plan, with every prior.
        identity: The identity of the merge, encoded.
        digests: SHA-256 of each input file.
        stages: The learned coefficients of each stage.
        importance_L: The importance of the merged tensors, [L], in the order of the last stage's layout.
        metrics: The rows of metrics.parquet.
        weights: The names of the weight files, which may be in another folder.
        devices: What trainer and experts computed on.
        fits: The coefficients of the layers in closed form, if the merge computed them.
        checked: The contents of end_check.parquet, if the merge has experts' outputs.
    """
    record = folder / "merge"
    names = [expert.name for expert in plan.experts]
    priors = {"priors": dict(zip(names, plan.priors, strict=True))}
    write_coefficients(record / "coefficients.parquet", stages, names)
    if importance_L is not None:
        write_importance(record / "importance.parquet", stages[-1].layout, importance_L, plan.numels)
    write_metrics(record / "metrics.parquet", metrics)
    _write_fits(folder, plan, fits)
    if checked is not None:
        pyarrow.parquet.write_table(checked, record / "end_check.parquet")
    draw_coefficients(folder / PICTURE, names, plan.priors, stages[-1])
    write_card(folder / "README.md", plan, stages[-1], digests, fits, checked)
    more = priors | {"files": _files(folder, plan, weights), "devices": devices or {}}
    write_config(record / "config.yaml", plan, identity, _hashed(plan, digests), more)


def write_weight_space_record(
    folder: Path,
    plan: Plan,
    method: Method,
    identity: bytes,
    digests: Mapping[str, str],
    weights: Sequence[str],
    fits: Fits = NO_FITS,
) -> None:
    """Write the model card and the files of `merge/` of a weight-space merge; see `write_record`."""
    _write_fits(folder, plan, fits)
    write_weight_space_card(folder / "README.md", plan, method, digests, fits)
    files = {"files": _files(folder, plan, weights)}
    write_config(folder / "merge" / "config.yaml", plan, identity, _hashed(plan, digests), files)


def write_statistics_record(folder: Path, plan: Plan, identity: bytes, digests: Mapping[str, str]) -> None:
    """Write merge/config.yaml beside the statistics of the plan's models; see `write_record`."""
    files = sorted({*LocalFolder(folder).names(), *STATISTICS_FILES})
    more = {"statistics": list(plan.config.collect), "files": files}
    write_config(folder / "merge" / "config.yaml", plan, identity, _hashed(plan, digests), more)


def _write_fits(folder: Path, plan: Plan, fits: Fits) -> None:
    if fits:
        write_fits(folder / "merge" / "layers.parquet", fits, [expert.name for expert in plan.experts])


def _files(folder: Path, plan: Plan, weights: Sequence[str]) -> list[str]:
    """Return the names of all files of the output: those in `folder` so far, the weights, and those that follow.

    `--fresh` replaces an earlier merge only if there is nothing else in its folder.
    """
    last = {*LAST_FILES, *(["merge/documents.json"] if plan.documents else [])}
    return sorted({*LocalFolder(folder).names(), *weights, *last})


def _hashed(plan: Plan, digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of the input files by model and file."""
    return {model: {file: digests[file] for file in files} for model, files in input_files(plan).items()}


def write_config(
    path: Path,
    plan: Plan,
    identity: bytes,
    inputs: Mapping[str, Mapping[str, str]],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write merge/config.yaml: the resolved config, and under `record` date, versions, inputs and `more`.

    The identity is written beside it, as identity.json; `record` has its SHA-256. `inputs` maps each model to the
    SHA-256 of its files. The config of a file of several merges has their documents, and their identities are written
    to documents.json.
    """
    (path.parent / "identity.json").write_bytes(identity)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {
        "identity": hashlib.sha256(identity).hexdigest(),
        "date": date,
        "versions": versions(),
        "inputs": inputs,
        **more,
    }
    config = with_models(resolved_config(plan), {document.place: document.name for document in plan.documents})
    own = yaml.safe_dump(config | {"record": record}, sort_keys=False, allow_unicode=True)
    path.write_text("---\n".join([*(document.config for document in plan.documents), own]), encoding="utf-8")
    if plan.documents:
        identities = {document.name: document.identity for document in plan.documents}
        (path.parent / "documents.json").write_text(json.dumps(identities, indent=0), encoding="utf-8")


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write merge/metrics.parquet: one row per sample of each optimiser step."""
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows), schema=METRICS), path)
