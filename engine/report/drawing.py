"""How a page draws its charts: plotly's JavaScript, the JSON of the figures, and a light and a dark template.

The JavaScript is plotly's bundle for cartesian charts, which is a third of the whole one, compressed: the browser
unpacks it. Versions have to correspond (`VERSION`), as Python's plotly checks the figures. To replace it:

    npm pack plotly.js-cartesian-dist-min@VERSION
    tar xzf plotly.js-cartesian-dist-min-VERSION.tgz
    gzip -9nc package/plotly-cartesian.min.js > engine/report/assets/plotly-cartesian.min.js.gz
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.io.json import to_json_plotly

from engine.report.charts import COLOURS

# MIT, see plotly-LICENSE.txt beside it.
BUNDLE = Path(__file__).with_name("assets") / "plotly-cartesian.min.js.gz"
VERSION = "4.1.1"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
# Ink, grid lines, and background of what lies over a chart; colours around 0, and from 0 on.
LIGHT = (
    "#30363f",
    "#ebf0f8",
    "#ffffff",
    ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"),
    ("#f4f8fd", "#08306b"),
)
DARK = (
    "#c9d1d9",
    "#2b313b",
    "#1b2028",
    ("#6cb2ff", "#2f5f96", "#1e232b", "#96463f", "#ff8577"),
    ("#1e232b", "#8cc4ff"),
)


def library() -> str:
    """Return plotly's JavaScript, compressed by gzip, in base64. A page needs it once."""
    return base64.b64encode(BUNDLE.read_bytes()).decode()


def figure_json(figure: go.Figure) -> Markup:
    """Return a figure as JSON that is safe inside a script, without its template."""
    content = figure.to_plotly_json()
    content["layout"].pop("template", None)
    return Markup(to_json_plotly(content))


def templates() -> Markup:
    """Return the templates as JSON: `light` and `dark`."""
    return Markup(to_json_plotly({"light": _template(*LIGHT), "dark": _template(*DARK)}))


def _template(ink: str, grid: str, over: str, around: tuple[str, ...], rising: tuple[str, ...]) -> dict[str, Any]:
    """Return a template in these colours; see LIGHT."""
    axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "automargin": True, "title": {"standoff": 8}}
    layout = {
        "colorway": COLOURS,
        "colorscale": {"diverging": _scale(around), "sequential": _scale(rising)},
        "plot_bgcolor": "rgba(0,0,0,0)",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": ink},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"align": "left", "bgcolor": over, "bordercolor": grid, "font": {"color": ink}},
        "xaxis": axis,
        "yaxis": axis,
    }
    content: dict[str, Any] = go.layout.Template(layout=layout).to_plotly_json()
    return content


def _scale(colours: tuple[str, ...]) -> list[tuple[float, str]]:
    return [(place / (len(colours) - 1), colour) for place, colour in enumerate(colours)]
