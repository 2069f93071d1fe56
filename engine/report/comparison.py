"""The comparison of several merges: sections with tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.config.mergekit_yaml import as_yaml
from engine.report import charts
from engine.report.merge_folder import LOSSES, Merged
from engine.report.sections import LOSS_NAMES, Cell, Chart, ReportSection, Table, flat, key_figures, last_losses
from engine.task_vectors.coefficients import Array


def comparison(merges: Mapping[str, Merged]) -> list[ReportSection]:
    """Return the sections of a comparison: key figures, options that differ, losses, coefficients."""
    columns = [dict(key_figures(merge)) for merge in merges.values()]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    figures = Table([[key, *(column.get(key, "") for column in columns)] for key in keys], ["", *merges])
    sections = [ReportSection("Key figures", tables=[figures]), _differences(merges)]
    experts = list(dict.fromkeys(expert.name for merge in merges.values() for expert in merge.config.models))
    last = {name: dict(last_losses(merge)) for name, merge in merges.items()}
    nan = float("nan")
    tables = []
    for loss in dict.fromkeys(loss for losses in last.values() for loss in losses):
        rows: list[list[Cell]] = [
            [e, *(last[run].get(loss, {}).get(e, (nan, nan))[1] for run in merges)] for e in experts
        ]
        tables.append(Table(rows, ["expert", *merges], f"Last {loss}"))
    drawn = []
    curves_of = {(stage, loss) for merge in merges.values() for stage, of in merge.losses().items() for loss in of}
    for stage, loss in sorted(curves_of, key=lambda key: (key[0], LOSSES.index(key[1]))):
        having = {name: merge for name, merge in merges.items() if loss in merge.losses().get(stage, [])}
        curves = {name: merge.mean_curve(stage, loss) for name, merge in having.items()}
        figure = charts.lines({name: (curve.steps, curve.values) for name, curve in curves.items()}, LOSS_NAMES[loss])
        drawn.append(Chart(f"Stage {stage}: {LOSS_NAMES[loss]}, mean over the samples of a step", figure))
    if tables:
        sections.append(
            ReportSection("Losses", "Tables: the last stage, at the last visit of each sample.", tables, drawn)
        )
    means = {name: _mean_coefficients(merge, experts) for name, merge in merges.items() if merge.stages}
    if means:
        chart = Chart("Mean learned coefficient of each expert", charts.bars(means, experts, "mean α"), wide=True)
        sections.append(ReportSection("Coefficients", charts=[chart]))
    return sections


def _mean_coefficients(merge: Merged, experts: Sequence[str]) -> Array:
    table = list(merge.stages.values())[-1]
    means = table.values[:, table.layout.learned_columns].mean(axis=1)
    by_name = dict(zip((expert.name for expert in merge.config.models), means, strict=True))
    return np.array([by_name.get(name, np.nan) for name in experts])


def _differences(merges: Mapping[str, Merged]) -> ReportSection:
    """Return the section of options that differ; the options of an expert are listed by its name."""
    columns = []
    for merge in merges.values():
        options = as_yaml(merge.config)
        models = {entry.get("name", entry["model"]): entry for entry in options.pop("models", [])}
        columns.append({key: str(value) for key, value in flat({**options, "models": models}).items()})
    keys = sorted({key for column in columns for key in column})
    rows = [[key, *(column.get(key, "") for column in columns)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    text = "" if rows else "None: all runs have the same options."
    return ReportSection("Options that differ", text, [Table(rows, ["option", *merges])] if rows else [])
