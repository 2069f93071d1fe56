"""The report of one or several merges as a self-contained HTML page. docs/report.md describes its sections."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from engine.errors import ConfigError, OutputError
from engine.evaluation.items import unique
from engine.evaluation.results import Row
from engine.evaluation.tables import MetricTable, tables_of
from engine.methods.registry import get_method
from engine.output.names import public_name
from engine.report import charts
from engine.report.comparison import comparison
from engine.report.drawing import VERSION, figure_json, library, templates
from engine.report.glossary import WORDS, explained
from engine.report.merge_folder import Merged, read_evaluation
from engine.report.parts import Cell, Chart, PerCent, ReportSection, Table, number, share
from engine.report.sections import options_of, sections_of
from engine.report.summary import summary
from engine.storage.local_folder import LocalFolder, check_creatable
from engine.storage.paths import locate
from engine.untrusted import check_regular, cpu_limit, library_errors_as, memory_limit, shown

TEMPLATE = Path(__file__).with_name("report.html.j2")
# A line near the start of every page, by which `report` knows a file that it may replace.
MARK = b'<meta name="generator" content="expert-merging">'
# Limits of a report on folders from elsewhere: CPU seconds, and bytes of memory. A large merge takes some ten seconds.
SECONDS, MEMORY = 180, 2 << 30


def write_report(folders: Sequence[str], target: Path, evaluations: Sequence[Path] = ()) -> None:
    """Write the report of merges, given by the paths or URIs of their output folders.

    `evaluations` are parquet files of `evaluate` whose scores are shown as well.

    Raises:
        ConfigError: a folder is not the output of a merge, or a file is damaged.
        StorageError: the report cannot be written.
    """
    merges = [Merged.read(folder) for folder in folders]
    page = report_html(merges, [(path.name, read_evaluation(path)) for path in evaluations])
    LocalFolder(target.parent).write(target.name, page.encode(errors="replace"))


def report_on(folders: Sequence[str], target: Path, evaluations: Sequence[Path] = ()) -> None:
    """Write the report of folders that may be someone else's, in bounded time and memory; see `write_report`.

    Raises:
        OutputError: the target exists and is not a report, or cannot be created.
        ConfigError: a folder is not the output of a merge, a file is damaged, or the report takes too much.
        StorageError: the report cannot be written.
    """
    where, do = shown(", ".join(folders), 300), "report on fewer merges, or on unchanged output folders"
    target = locate(str(target), Path.cwd(), OutputError)
    _check_target(target)
    slow = ConfigError(f"the report takes more than {SECONDS} seconds", where, do=do)
    large = ConfigError(f"the report takes more than {MEMORY >> 30} GiB of memory", where, do=do)
    unfit = library_errors_as(
        lambda message: ConfigError(f"the files do not fit together: {message}", where, "an unchanged output folder")
    )
    with cpu_limit(slow, SECONDS), memory_limit(large, MEMORY), unfit:
        write_report(folders, target, evaluations)


def _check_target(target: Path) -> None:
    """Check that a report can be written to this path: there is nothing yet, or an earlier report."""
    if not os.path.lexists(target):
        check_creatable(target, "give another --out")
        return
    check_regular(target, None, OutputError, "the file for the report")
    with target.open("rb") as file:
        if MARK not in file.read(1000):
            raise OutputError(
                "the file exists and is not a report of this version",
                str(target),
                do="give another --out, or remove it",
            )


def report_html(merges: Sequence[Merged], evaluations: Sequence[tuple[str, pa.Table]] = ()) -> str:
    """Return the page. `evaluations` are named tables of scores, shown next to those of the merges themselves."""
    runs = dict(zip(_names(merges), merges, strict=True))
    own = {name: merge.evaluation for name, merge in runs.items() if merge.evaluation is not None}
    names = unique([*runs, *(name for name, _ in evaluations)])[len(runs) :]
    scores = _scores(own | dict(zip(names, (table for _, table in evaluations), strict=True)))
    if len(merges) == 1:
        config, method = merges[0].config, get_method(merges[0].config.merge_method)
        title = f"{len(config.models)} experts merged by {method.name}"
        subtitle = f"{method.formula} ({method.source})"
        sections = [summary(merges[0]), *scores, *sections_of(merges[0]), options_of(merges[0])]
    else:
        title, subtitle, sections = f"{len(runs)} merges compared", ", ".join(runs), [*comparison(runs), *scores]
    parts = {}
    if len(runs) > 1:
        parts = {name: [summary(merge), *sections_of(merge), options_of(merge)] for name, merge in runs.items()}
    anchor = _Anchors()

    def anchored(of: Sequence[ReportSection]) -> list[tuple[str, ReportSection]]:
        return [(anchor(section.title), section) for section in of]

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters |= {"cell": _shown, "explained": explained, "part": lambda value: f"{100 * min(1, value):.1f}%"}
    page.tests["percent"] = lambda cell: isinstance(cell, PerCent) and math.isfinite(cell)
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=subtitle,
        sections=anchored(sections),
        runs={name: (anchor(name), anchored(of_run)) for name, of_run in parts.items()},
        words=WORDS,
        library=library(),
        templates=templates(),
        figure=figure_json,
        made_by=f"expert-merging {version('expert-merging')} with plotly.js {VERSION} (MIT licence)",
    )


def _names(merges: Sequence[Merged]) -> list[str]:
    """Return a name for each run: the last part of its path, with a number if two are equal."""
    paths = [merge.where.rstrip("/") for merge in merges]
    if twice := [path for path, times in Counter(paths).items() if times > 1]:
        raise ConfigError("the run is given twice", twice[0], "different runs")
    last = [path.rpartition("/")[2] or path for path in paths]
    return unique(last)


def _scores(sources: Mapping[str, pa.Table]) -> list[ReportSection]:
    """Return the section of scores, with one chart and one table per metric.

    A model whose scores differ between sources appears once per source.
    """
    by_model: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    models = list(dict.fromkeys(str(model) for table in sources.values() for model in table["model"].to_pylist()))
    public = dict(zip(models, unique([public_name(model) for model in models]), strict=True))
    for name, table in sources.items():
        for row in table.to_pylist():
            by_model[name, public[str(row["model"])]].append(row)
    ways = Counter(model for _, model in {(repr(rows), model) for (_, model), rows in by_model.items()})
    rows = [
        Row(
            model if ways[model] == 1 else f"{name}: {model}",
            row["data"],
            row["metric"],
            row["value"],
            row["count"],
            row["expert"] and public.get(row["expert"], public_name(row["expert"])),
        )
        for (name, model), of_model in by_model.items()
        for row in of_model
    ]
    drawn, tables = [], []
    for scores in tables_of(rows):
        values = {m: np.array([_number(scores.value(m, d)) for d in scores.data]) for m in scores.models}
        drawn.append(Chart(scores.metric, charts.bars(values, scores.data, scores.metric), wide=True))
        tables.append(_score_table(scores))
    text = "Scores of models by data set. The number of examples is in brackets."
    return [ReportSection("Evaluation", text, tables=tables, charts=drawn)] if rows else []


def _score_table(scores: MetricTable) -> Table:
    """Return a table of models by data set, with the mean and the share of the experts' scores, where there is one."""
    found: dict[str, set[int]] = defaultdict(set)
    for (_, of), row in scores.rows.items():
        found[of].add(row.count)
    head = ["model"]
    for data, counts in ((data, sorted(found[data])) for data in scores.data):
        expert = f", expert: {scores.experts[data]}" if data in scores.experts else ""
        head.append(f"{data} ({' or '.join(f'{n:,}' for n in counts)}{expert})")
    columns = {"mean": scores.mean, "% of the experts": scores.of_experts}
    used = {name: get for name, get in columns.items() if any(get(model) is not None for model in scores.models)}
    lines: list[list[Cell]] = [
        [
            model,
            *(_number(scores.value(model, d)) for d in scores.data),
            *(_number(get(model)) for get in used.values()),
        ]
        for model in scores.models
    ]
    return Table(lines, [*head, *used], scores.metric)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _shown(cell: Cell) -> str:
    """Return the cell of a table as text."""
    if isinstance(cell, PerCent):
        return share(cell)
    return cell if isinstance(cell, str) else number(cell)


class _Anchors:
    """The ids of a page's sections: every call gives a new one."""

    def __init__(self) -> None:
        # The template has these ids itself.
        self._given = Counter(["glossary", "library", "templates"])

    def __call__(self, title: str) -> str:
        """Return an id of the letters and digits of a title, with a number if another section has it."""
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        self._given[name] += 1
        return name if self._given[name] == 1 else f"{name}-{self._given[name]}"
