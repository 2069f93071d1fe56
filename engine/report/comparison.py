"""The comparison of several merges: sections with tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.config.mergekit_yaml import as_yaml
from engine.report import charts
from engine.report.merge_folder import LOSSES, Merged
from engine.report.parts import LOSS_NAMES, Chart, ReportSection, Table, number
from engine.report.sections import flat, key_figures
from engine.task_vectors.coefficients import Array

NAN = float("nan")


def comparison(merges: Mapping[str, Merged]) -> list[ReportSection]:
    """Return the sections of a comparison: summary, options and key figures that differ, losses, coefficients."""
    differences = _differences(merges)
    experts = list(dict.fromkeys(expert.name for merge in merges.values() for expert in merge.config.models))
    last = _last(merges)
    sections = [_summary(last, differences), differences, _key_figures(merges)]
    tables = [
        Table([[e, *(of_run.get(e, NAN) for of_run in runs.values())] for e in experts], ["expert", *runs], title)
        for title, runs in ((f"Last {LOSS_NAMES[loss]}", runs) for loss, runs in last.items())
    ]
    drawn = []
    curves_of = {(stage, loss) for merge in merges.values() for stage, of in merge.losses().items() for loss in of}
    for stage, loss in sorted(curves_of, key=lambda key: (key[0], LOSSES.index(key[1]))):
        having = {name: merge for name, merge in merges.items() if loss in merge.losses().get(stage, [])}
        curves = {name: merge.mean_curve(stage, loss) for name, merge in having.items()}
        figure = charts.lines({name: (curve.steps, curve.values) for name, curve in curves.items()}, LOSS_NAMES[loss])
        drawn.append(Chart(f"Stage {stage}: {LOSS_NAMES[loss]}, mean over the samples of a step", figure, logs=True))
    if tables:
        sections.append(
            ReportSection(
                "Losses", "Tables: the last stage, at the last visit of each sample.", tables=tables, charts=drawn
            )
        )
    means = {name: _mean_coefficients(merge, experts) for name, merge in merges.items() if merge.stages}
    if means:
        chart = Chart("Mean learned coefficient of each expert", charts.bars(means, experts, "mean α"), wide=True)
        sections.append(ReportSection("Coefficients", charts=[chart]))
    return sections


def _last(merges: Mapping[str, Merged]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the last values of each loss by run and expert; a run without the loss has none."""
    distances = {name: merge.distances() for name, merge in merges.items()}
    losses = [loss for loss in LOSSES if any(loss in of_run for of_run in distances.values())]
    return {
        loss: {
            name: {expert: pair[1] for expert, pair in of_run.get(loss, {}).items()}
            for name, of_run in distances.items()
        }
        for loss in losses
    }


def _summary(last: Mapping[str, Mapping[str, Mapping[str, float]]], differences: ReportSection) -> ReportSection:
    """Return which run ends with the smallest losses, and the names of the options that differ."""
    points = []
    for loss, runs in last.items():
        means = {name: sum(of.values()) / len(of) for name, of in runs.items() if of}
        least = min(means, key=lambda name: means[name])
        others = ", ".join(f"{name} {number(mean)}" for name, mean in means.items() if name != least)
        points.append(f"Smallest mean {LOSS_NAMES[loss]} at the end: {least} with {number(means[least])}; {others}.")
    options = [str(row[0]) for table in differences.tables for row in table.rows]
    points.append(f"Options that differ: {', '.join(options) if options else 'none'}.")
    text = "Losses of two runs can be compared if the runs have the same samples and options of the losses."
    return ReportSection("Summary", text if last else "", points)


def _key_figures(merges: Mapping[str, Merged]) -> ReportSection:
    """Return the key figures that differ, and the others in a folded table."""
    columns = [dict(key_figures(merge)) for merge in merges.values()]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key, *(column.get(key, "") for column in columns)] for key in keys]
    differ, same = ([row for row in rows if (len(set(row[1:])) > 1) is wanted] for wanted in (True, False))
    tables = [Table(differ, ["", *merges])] if differ else []
    folded = Table([row[:2] for row in same], title="Key figures that are the same") if same else None
    return ReportSection("Key figures", tables=tables, folded=folded)


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
    tables = [Table(rows, ["option", *merges])] if rows else []
    return ReportSection("Options that differ", text, tables=tables)
