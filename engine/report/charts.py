"""The charts of a report as plotly figures, and their HTML.

Names come from outside. plotly interprets a few HTML tags in every text, so names are escaped before they become part
of one. The JSON that plotly writes is safe inside a script.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from engine.task_vectors.coefficients import Array

# The colour of grid lines.
PALE = "#ebf0f8"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
COLOURS = ("#4269d0", "#efb118", "#e45c4a", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#9498a0")
# The most names that fit a legend, and the most characters of a name that leave room for the chart.
LEGEND, WIDTH = 12, 26
# The most cells of a heatmap that have texts of their own; a page with more would load slowly.
CELLS = 200_000
# A tensor of a block, such as `model.layers.3.mlp.up_proj.weight`: the stack `model.layers.`, the block 3, the kind.
BLOCK = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<block>\d+)\.(?P<kind>.+)", re.DOTALL)


def library() -> Markup:
    """Return plotly's JavaScript, which a page needs once."""
    return Markup(get_plotlyjs())


def as_html(figure: go.Figure, identifier: str) -> Markup:
    """Return the HTML of a chart, for a page that contains `library()`."""
    options = {"displaylogo": False, "responsive": True}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=identifier, config=options))


def labels(names: Sequence[str]) -> list[str]:
    """Return names for an axis or a legend: escaped, and shortened to WIDTH characters if they remain distinct."""
    cut = [name if len(name) <= WIDTH else f"…{name[1 - WIDTH :]}" for name in names]
    return [html.escape(name, quote=False) for name in (cut if len(set(cut)) == len(set(names)) else names)]


def ends(names: Sequence[str]) -> list[str]:
    """Return the shortest unique dotted suffix of each of several distinct names, without `.weight`."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    if len(set(map(tuple, parts))) < len(parts):
        parts = [name.split(".") for name in names]
    tails = [[".".join(part[-count:]) for count in range(1, len(part) + 1)] for part in parts]
    seen = Counter(tail for of_name in tails for tail in of_name)
    return [next((tail for tail in of_name if seen[tail] == 1), of_name[-1]) for of_name in tails]


@dataclass(frozen=True)
class Blocks:
    """Tensors by block and kind: `cells` [kinds, blocks] has their indices, -1 for none; `outside` has all others."""

    kinds: list[str]
    blocks: list[int]
    cells: npt.NDArray[np.int64]
    outside: list[int]

    @classmethod
    def of(cls, tensors: Sequence[str]) -> Blocks:
        """Return the blocks and kinds of tensors: `layers.3.q_proj.weight` is `q_proj` of block 3."""
        matches = {place: match for place, name in enumerate(tensors) if (match := BLOCK.fullmatch(name))}
        # Two stacks of blocks, such as a vision tower and a language model, have kinds of their own.
        kinds = list(dict.fromkeys(f"{match['stack']}*.{match['kind']}" for match in matches.values()))
        blocks = sorted({int(match["block"]) for match in matches.values()})
        row, column = ({key: place for place, key in enumerate(keys)} for keys in (kinds, blocks))
        cells = np.full((len(kinds), len(blocks)), -1)
        for place, match in matches.items():
            cells[row[f"{match['stack']}*.{match['kind']}"], column[int(match["block"])]] = place
        return cls(ends(kinds), blocks, cells, [place for place in range(len(tensors)) if place not in matches])

    def spread(self, values: Array) -> Array:
        """Return values [tensors] as [kinds, blocks], NaN where there is no tensor."""
        return np.where(self.cells >= 0, values[self.cells], np.nan)

    def spread_texts(self, texts: Sequence[str]) -> list[list[str]]:
        """Return texts [tensors] as [kinds][blocks], empty where there is no tensor."""
        return [[texts[place] if place >= 0 else "" for place in row] for row in self.cells.tolist()]

    def in_order(self) -> list[int]:
        """Return the indices of all tensors by block, then by kind; those outside the blocks come last."""
        return [*(int(place) for place in self.cells.T.flat if place >= 0), *self.outside]

    def names(self, tensors: Sequence[str]) -> list[str]:
        """Return short names, `block · kind` within blocks, or the full names if two short ones are equal."""
        short = dict(zip(self.outside, ends([tensors[place] for place in self.outside]), strict=True))
        for (row, column), place in np.ndenumerate(self.cells):
            short[int(place)] = f"{self.blocks[column]} · {self.kinds[row]}"
        names = [short[place] for place in range(len(tensors))]
        return names if len(set(names)) == len(names) else list(tensors)


@dataclass(frozen=True)
class Scale:
    """The colour scale of a heatmap, from `low` to `high`; centred on 0 if `low` is negative."""

    title: str
    high: float
    low: float = 0.0
    format: str = ""


@dataclass(frozen=True)
class Axis:
    """The names along an axis of a heatmap; `ticks` maps names to labels, if only some names are labelled."""

    title: str
    names: Sequence[str]
    ticks: Mapping[str, str] = field(default_factory=dict)


def heatmap(values: Array, texts: Sequence[Sequence[str]], across: Axis, down: Axis, scale: Scale) -> go.Figure:
    """Return a heatmap of `values` [down, across], NaN for an empty cell. `texts` are shown when pointing at a cell.

    The names of an axis must be distinct and escaped by `labels`; texts must be escaped.
    """
    rows, columns = len(down.names), len(across.names)
    longest = max(map(len, across.ticks.values() or across.names))
    upright = longest < 5
    few = values.size <= CELLS
    hover = "%{text}" if few else f"{scale.title} = %{{z:{scale.format}}}"
    body = rows * next((size for most, size in ((12, 22), (40, 16), (60, 12)) if rows <= most), 0) or 720
    trace = go.Heatmap(
        z=values.astype(np.float32),
        x=list(across.names),
        y=list(down.names),
        text=texts if few else None,
        hovertemplate=f"<b>%{{y}}</b>, {across.title} %{{x}}<br>{hover}<extra></extra>",
        hoverongaps=False,
        zmin=scale.low,
        zmax=scale.high,
        colorscale="RdBu_r" if scale.low < 0 else "Blues",
        colorbar={
            "thickness": 10,
            "outlinewidth": 0,
            "title": {"text": scale.title, "side": "right"},
            "tickformat": scale.format,
            "lenmode": "pixels",
            "len": max(110, min(body, 260)),
            "y": 1,
            "yanchor": "top",
        },
        xgap=1 if columns <= 100 else 0,
        ygap=1 if rows <= 60 else 0,
    )
    figure = _figure([trace], max(180, body + (60 if upright else 50 + 7 * longest)))
    look = {"tickangle": 0, "nticks": 8} if upright else {"tickangle": -90}
    figure.update_xaxes(type="category", title=across.title, showgrid=False, **look)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    for axis, update in ((across, figure.update_xaxes), (down, figure.update_yaxes)):
        if axis.ticks:
            update(tickmode="array", tickvals=list(axis.ticks), ticktext=list(axis.ticks.values()))
    return figure


def lines(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str) -> go.Figure:
    """Return a chart with one line per name over optimiser steps, and buttons for a linear or logarithmic axis."""
    named = zip(labels(list(curves)), curves.values(), strict=True)
    traces = [
        go.Scatter(
            x=np.array(steps) + 1,
            y=np.array(values, dtype=np.float64),
            name=name,
            mode="lines+markers" if len(steps) <= 40 and len(curves) <= LEGEND else "lines",
            line={"width": 1.75},
            marker={"size": 5},
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.5g}<extra></extra>",
        )
        for name, (steps, values) in named
    ]
    figure = _figure(traces, 340)
    figure.update_xaxes(title="optimiser step")
    figure.update_yaxes(title=title, rangemode="tozero")
    buttons = [{"label": kind, "method": "relayout", "args": [{"yaxis.type": kind}]} for kind in ("linear", "log")]
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 6}}
    look = {"type": "buttons", "direction": "right", "showactive": True, "font": {"size": 11}, "bordercolor": "#d5d9e0"}
    figure.update_layout(
        updatemenus=[{**look, **place, "buttons": buttons}], margin_t=34, showlegend=1 < len(curves) <= LEGEND
    )
    return figure


def bars(
    series: Mapping[str, Array],
    names: Sequence[str],
    title: str,
    texts: Sequence[str] | None = None,
    flat: bool = False,
) -> go.Figure:
    """Return grouped bars: a value per series and name, NaN for none. `flat`: horizontal bars, with `texts` beside."""
    categories = labels(names)
    shown = labels(list(series))
    traces = [
        go.Bar(
            x=values if flat else categories,
            y=categories if flat else values,
            orientation="h" if flat else "v",
            name=name,
            text=texts,
            hovertemplate=("%{y}" if flat else "%{x}")
            + "<br>"
            + ("%{text}" if texts else "%{y:.5g}")
            + "<extra>%{fullData.name}</extra>",
        )
        for name, values in zip(shown, series.values(), strict=True)
    ]
    figure = _figure(traces, 60 + 22 * len(names) if flat else 340)
    figure.update_layout(showlegend=len(series) > 1, bargap=0.25)
    if flat:
        figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
        figure.update_xaxes(title=title)
        figure.update_traces(textposition="outside", cliponaxis=False)
        figure.update_layout(margin_r=10 + 7 * max(map(len, texts or [""])))
    else:
        figure.update_xaxes(type="category", showgrid=False)
        figure.update_yaxes(title=title)
    return figure


def _figure(traces: Sequence[Any], height: int) -> go.Figure:
    # Without a template: plotly copies one into every figure, which takes longer than the rest of the figure.
    axis = {"gridcolor": PALE, "linecolor": PALE, "zerolinecolor": PALE, "automargin": True, "title": {"standoff": 8}}
    layout = {
        "template": "none",
        "colorway": COLOURS,
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
        "font": {"family": FONT, "size": 12, "color": "#30363f"},
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"align": "left"},
        "xaxis": axis | {"fixedrange": False},
        "yaxis": axis,
    }
    return go.Figure(list(traces), layout)
