"""Numbers and names in, plotly's figures and their HTML out. Knows no merge and no files.

Names come from outside. plotly reads a few HTML tags in every text, so a name is escaped before it is part of one; its
JSON is safe within a script.
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

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


COLOURS = ("#4269d0", "#efb118", "#e45c4a", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#9498a0")


# Names of so many lines or bars still fit a legend; a longer name of an axis would leave no room for the chart.
LEGEND, WIDTH = 12, 26


# Cells of a heatmap that may have a text of their own: a page of more would be slow to load.
CELLS = 200_000


# Numbers of a block's tensors; `stack.` is what stands before it.
BLOCK = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<block>\d+)\.(?P<kind>.+)", re.DOTALL)


def library() -> Markup:
    """plotly's JavaScript, for the one script that every chart of a page needs."""
    return Markup(get_plotlyjs())


def as_html(figure: go.Figure, identifier: str) -> Markup:
    """The chart, to be drawn where it stands in a page with `library`."""
    options = {"displaylogo": False, "responsive": True}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=identifier, config=options))


def labels(names: Sequence[str]) -> list[str]:
    """Names for an axis or a legend, in order: escaped, and cut where they are long and still differ."""
    cut = [name if len(name) <= WIDTH else f"…{name[1 - WIDTH :]}" for name in names]
    return [html.escape(name, quote=False) for name in (cut if len(set(cut)) == len(set(names)) else names)]


def ends(names: Sequence[str]) -> list[str]:
    """Of each of different names the shortest end, from a dot on, that no other has; without `.weight`."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    if len(set(map(tuple, parts))) < len(parts):
        parts = [name.split(".") for name in names]
    tails = [[".".join(part[-count:]) for count in range(1, len(part) + 1)] for part in parts]
    seen = Counter(tail for mine in tails for tail in mine)
    return [next((tail for tail in mine if seen[tail] == 1), mine[-1]) for mine in tails]


@dataclass(frozen=True)
class Blocks:
    """Tensors by block and kind: `cells` [kinds, blocks] has the place of each, -1 for none; `outside`: of no block."""

    kinds: list[str]
    blocks: list[int]
    cells: npt.NDArray[np.int64]
    outside: list[int]

    @classmethod
    def of(cls, tensors: Sequence[str]) -> Blocks:
        """`layers.3.q_proj.weight` is `q_proj` of block 3."""
        found = {place: match for place, name in enumerate(tensors) if (match := BLOCK.fullmatch(name))}
        # Two stacks of blocks, as of a vision tower and a language model, have kinds of their own.
        kinds = list(dict.fromkeys(f"{match['stack']}*.{match['kind']}" for match in found.values()))
        blocks = sorted({int(match["block"]) for match in found.values()})
        row, column = ({key: place for place, key in enumerate(keys)} for keys in (kinds, blocks))
        cells = np.full((len(kinds), len(blocks)), -1)
        for place, match in found.items():
            cells[row[f"{match['stack']}*.{match['kind']}"], column[int(match["block"])]] = place
        return cls(ends(kinds), blocks, cells, [place for place in range(len(tensors)) if place not in found])

    def spread(self, values: Array) -> Array:
        """[tensors] → [kinds, blocks], NaN where there is no tensor."""
        return np.where(self.cells >= 0, values[self.cells], np.nan)

    def spread_texts(self, texts: Sequence[str]) -> list[list[str]]:
        """The same of texts, empty where there is no tensor."""
        return [[texts[place] if place >= 0 else "" for place in row] for row in self.cells.tolist()]

    def in_order(self) -> list[int]:
        """Every tensor's place: by block, then by kind, and those of no block last."""
        return [*(int(place) for place in self.cells.T.flat if place >= 0), *self.outside]

    def names(self, tensors: Sequence[str]) -> list[str]:
        """A short name of each, `block · kind` within blocks; the tensors' own names where two were alike."""
        short = dict(zip(self.outside, ends([tensors[place] for place in self.outside]), strict=True))
        for (row, column), place in np.ndenumerate(self.cells):
            short[int(place)] = f"{self.blocks[column]} · {self.kinds[row]}"
        found = [short[place] for place in range(len(tensors))]
        return found if len(set(found)) == len(found) else list(tensors)


@dataclass(frozen=True)
class Scale:
    """What a heatmap's colours mean: `title`, and from where to where; around 0 where it goes `low` below it."""

    title: str
    high: float
    low: float = 0.0
    format: str = ""


@dataclass(frozen=True)
class Axis:
    """Names along a heatmap; `ticks` are those to be written, where not all of them have room."""

    title: str
    names: Sequence[str]
    ticks: Mapping[str, str] = field(default_factory=dict)


def heatmap(values: Array, texts: Sequence[Sequence[str]], across: Axis, down: Axis, scale: Scale) -> go.Figure:
    """`values` [down, across], NaN where there is nothing; `texts` are shown of the cell that is pointed at.

    The names of an axis are different ones, escaped by `labels`, as the texts are.
    """
    rows, columns = len(down.names), len(across.names)
    written = max(map(len, across.ticks.values() or across.names))
    upright = written < 5
    few = values.size <= CELLS
    told = "%{text}" if few else f"{scale.title} = %{{z:{scale.format}}}"
    body = rows * next((size for most, size in ((12, 22), (40, 16), (60, 12)) if rows <= most), 0) or 720
    trace = go.Heatmap(
        z=values.astype(np.float32),
        x=list(across.names),
        y=list(down.names),
        text=texts if few else None,
        hovertemplate=f"<b>%{{y}}</b>, {across.title} %{{x}}<br>{told}<extra></extra>",
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
    figure = _figure([trace], max(180, body + (60 if upright else 50 + 7 * written)))
    look = {"tickangle": 0, "nticks": 8} if upright else {"tickangle": -90}
    figure.update_xaxes(type="category", title=across.title, showgrid=False, **look)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    for axis, update in ((across, figure.update_xaxes), (down, figure.update_yaxes)):
        if axis.ticks:
            update(tickmode="array", tickvals=list(axis.ticks), ticktext=list(axis.ticks.values()))
    return figure


def lines(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str) -> go.Figure:
    """A line a name over optimiser steps, with buttons for the axis's scale."""
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
    """Groups of bars: a value of each series for each name, NaN for none; `flat` ones lie, `texts` beside them."""
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
    figure = go.Figure(list(traces))
    figure.update_layout(
        template="plotly_white",
        colorway=COLOURS,
        font={"family": FONT, "size": 12, "color": "#30363f"},
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(automargin=True, title_standoff=8, fixedrange=False)
    figure.update_yaxes(automargin=True, title_standoff=8)
    return figure
