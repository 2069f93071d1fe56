"""Draw `results/sensitivity.jsonl`: how Expert Merging and Expert Merging++ depend on one option at a time.

`python benchmarks/quality/sensitivity_figure.py OUT.png` draws the figure in a headless Chromium.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import plotly.graph_objects as go
from picture import browser
from plotly.subplots import make_subplots
from sensitivity import AROUND, POINTS
from table import Line, normalised, own_scores, read

TITLES = {"samples": "samples an expert", "budget": "budget", "kappa": "κ", "experts": "experts merged"}
COLOURS = {"expert_merging": "#9498a0", "expert_merging_pp": "#4269d0"}


def setting(line: Line) -> dict[str, Any]:
    """Return the settings of a line, defaults included."""
    return AROUND | {name: line["key"].get(name, line["key"]["options"].get(name, AROUND[name])) for name in AROUND}


def curve(lines: list[Line], method: str, name: str, own: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the values of the varied option and the normalised mean there; stage 1 ignores budget and κ."""
    ignored = ("budget", "kappa") if method == "expert_merging" else ()
    for value in POINTS[name]:
        wanted = {key: one for key, one in (AROUND | {name: value}).items() if key not in ignored}
        scores = [
            normalised(line, own)
            for line in lines
            if line["key"]["method"] == method and wanted.items() <= setting(line).items()
        ]
        if scores:
            yield f"{value:g}", statistics.mean(scores)


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    lines = read("sensitivity")
    own = own_scores(read("validation", lines[-1]["training"]))
    figure = make_subplots(1, len(POINTS), shared_yaxes=True, subplot_titles=[TITLES[name] for name in POINTS])
    for column, name in enumerate(POINTS, 1):
        for method, colour in COLOURS.items():
            points = list(curve(lines, method, name, own))
            figure.add_trace(
                go.Scatter(
                    x=[value for value, _ in points],
                    y=[score for _, score in points],
                    name=method,
                    line_color=colour,
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="exact match, normalised", col=1)
    figure.update_layout(template="plotly_white", width=1100, height=320, margin_t=40, margin_b=30, legend_y=-0.15)
    figure.update_layout(legend_orientation="h")
    with browser() as started:
        page = started.new_page(viewport={"width": 1100, "height": 320})
        page.set_content(figure.to_html(include_plotlyjs=True, full_html=True))
        page.wait_for_selector(".main-svg")
        page.locator(".plotly-graph-div").screenshot(path=out)


if __name__ == "__main__":
    main()
