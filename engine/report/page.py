"""A report of merges as one HTML page that needs nothing else: what was learned, lost, used and scored.

From output folders to text; what is on it is told in docs/report.md. Knows no weights, no torch and no Ray.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from engine.errors import ConfigError
from engine.methods.registry import get_method
from engine.report import charts
from engine.report.comparison import comparison
from engine.report.merge_folder import Merged, read_evaluation
from engine.report.sections import Cell, Chart, ReportSection, Table, options_of, sections_of
from engine.storage.local_folder import LocalFolder

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(folders: Sequence[str], target: Path, evaluations: Sequence[Path] = ()) -> None:
    """Write the report of merges, by their output folders' paths or URIs; `evaluations` are further tables of scores.

    Raises:
        ConfigError: a folder is no merge's output, or a file is none that a merge or an evaluation writes.
        StorageError: it cannot be written.
    """
    merges = [Merged.read(folder) for folder in folders]
    page = report_html(merges, {str(path): read_evaluation(path) for path in evaluations})
    LocalFolder(target.parent).write(target.name, page.encode())


def report_html(merges: Sequence[Merged], evaluations: Mapping[str, pa.Table] | None = None) -> str:
    """The page. `evaluations` stand beside those that the merges have, each with its own name."""
    runs = dict(zip(_names(merges), merges, strict=True))
    found = {name: merge.evaluation for name, merge in runs.items() if merge.evaluation is not None}
    scores = _scores(found | dict(evaluations or {}))
    if len(merges) == 1:
        config, method = merges[0].config, get_method(merges[0].config.merge_method)
        title = f"{len(config.models)} experts merged by {method.name}"
        subtitle = f"{method.formula} ({method.source})"
        sections = [*sections_of(merges[0]), *scores, options_of(merges[0])]
    else:
        title, subtitle, sections = f"{len(runs)} merges compared", ", ".join(runs), [*comparison(runs), *scores]
    parts = {name: [*sections_of(merge), options_of(merge)] for name, merge in runs.items()} if len(runs) > 1 else {}
    number = count(1)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters["figure"] = _figure
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        runs=parts,
        library=charts.library(),
        draw=lambda figure: charts.as_html(figure, f"chart-{next(number)}"),
        made_by=f"expert-merging {version('expert-merging')} with plotly {version('plotly')}",
    )


def _names(merges: Sequence[Merged]) -> list[str]:
    """What each run is called: the last part of its path, unless two have the same."""
    paths = [merge.where.rstrip("/") for merge in merges]
    if twice := [path for path, times in Counter(paths).items() if times > 1]:
        raise ConfigError("given twice", twice[0], "runs that differ")
    last = [path.rpartition("/")[2] or path for path in paths]
    return last if len(set(last)) == len(last) else paths


def _scores(sources: Mapping[str, pa.Table]) -> list[ReportSection]:
    """What models score, a chart and a table a metric. Where sources differ about a model, it is one of each source."""
    told: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for name, table in sources.items():
        for row in table.to_pylist():
            told[name, row["model"]].append(row)
    ways = Counter(model for _, model in {(repr(rows), model) for (_, model), rows in told.items()})
    rows = [
        (model if ways[model] == 1 else f"{name}: {model}", row) for (name, model), mine in told.items() for row in mine
    ]
    drawn, tables = [], []
    for metric in dict.fromkeys(row["metric"] for _, row in rows):
        found = {(model, row["data"]): row for model, row in rows if row["metric"] == metric}
        models, data = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
        nothing = {"value": float("nan"), "count": 0}
        values = {m: np.array([found.get((m, d), nothing)["value"] for d in data], dtype=np.float64) for m in models}
        drawn.append(Chart(metric, charts.bars(values, data, metric), wide=True))
        counts = {d: sorted({row["count"] for (_, of), row in found.items() if of == d}) for d in data}
        head = ["model", *(f"{d} ({' or '.join(f'{n:,}' for n in counts[d])})" for d in data)]
        tables.append(Table([[model, *map(float, values[model])] for model in models], head, metric))
    text = "Scores of models on data; in brackets how many examples there are."
    return [ReportSection("Evaluation", text, tables, drawn)] if rows else []


def _figure(cell: Cell) -> str:
    if isinstance(cell, float):
        return "–" if np.isnan(cell) else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else cell
