"""The charts of a report as plotly figures.

Names come from outside. plotly interprets a few HTML tags in every text, so names are escaped before they become part
of one. Colours are those of a template (`engine.report.drawing`), since a page may be light or dark.
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

from engine.task_vectors.coefficients import Array

# The most names that fit a legend, and the most characters of a name that leave room for the chart.
LEGEND, WIDTH = 12, 26
# The lines of a chart with more names than that which are named: the highest at the end.
NAMED = 3
COLOURS = ("#4269d0", "#efb118", "#e45c4a", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#9498a0")
# The colour of lines without a name.
UNNAMED = "rgba(128, 128, 128, 0.4)"
# The most labels of an axis of which only some names are labelled: those that fit on a phone.
TICKS = 10
# The most names of upright bars, which have room for them.
UPRIGHT = 8
# The most cells of a heatmap that have texts of their own; a page with more would load slowly.
CELLS = 200_000
# A tensor of a block, such as `model.layers.3.mlp.up_proj.weight`: the stack `model.layers.`, the block 3, the kind.
BLOCK = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<block>\d+)\.(?P<kind>.+)", re.DOTALL)


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
        autocolorscale=True,
        zmin=scale.low,
        zmax=scale.high,
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
            every = -(-len(axis.ticks) // TICKS)
            names, texts = list(axis.ticks)[::every], list(axis.ticks.values())[::every]
            update(tickmode="array", tickvals=names, ticktext=texts)
    return figure


def lines(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str) -> go.Figure:
    """Return a chart with one line per name over optimiser steps.

    Of more than LEGEND lines, those that are highest at the end have colours and names; pointing at the others names
    them.
    """
    many = len(curves) > LEGEND
    last = {name: float(values[-1] or 0) for name, (_, values) in curves.items() if len(values)}
    highest = sorted(last, key=lambda name: last[name], reverse=True)[:NAMED] if many else list(curves)
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(highest)}
    ordered = {name: curves[name] for name in (*(name for name in curves if name not in highest), *highest)}
    traces = [
        go.Scatter(
            x=np.array(steps) + 1,
            y=np.array(values, dtype=np.float64),
            name=shown,
            mode="lines" if many or len(steps) > 40 else "lines+markers",
            line={"width": 1.75, "color": colours[name]} if name in colours else {"width": 1, "color": UNNAMED},
            showlegend=name in colours,
            marker={"size": 5},
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.3g}<extra></extra>",
        )
        for shown, (name, (steps, values)) in zip(labels(list(ordered)), ordered.items(), strict=True)
    ]
    figure = _figure(traces, 340)
    figure.update_xaxes(title="optimiser step")
    figure.update_yaxes(title=title, rangemode="tozero")
    figure.update_layout(showlegend=len(curves) > 1)
    return figure


def bars(
    series: Mapping[str, Array],
    names: Sequence[str],
    title: str,
    texts: Sequence[str] | None = None,
    flat: bool = False,
) -> go.Figure:
    """Return grouped bars: a value per series and name, NaN for none.

    `flat`: horizontal bars, with `texts` beside; so are those of more than UPRIGHT names.
    """
    categories, flat = labels(names), flat or len(names) > UPRIGHT
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
            + ("%{text}" if texts else "%{x:.3g}" if flat else "%{y:.3g}")
            + "<extra>%{fullData.name}</extra>",
        )
        for name, values in zip(shown, series.values(), strict=True)
    ]
    figure = _figure(traces, 60 + (10 + 12 * len(series)) * len(names) if flat else 340)
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


def spans(names: Sequence[str], begins: Array, ends: Array, texts: Sequence[str], marks: Sequence[float]) -> go.Figure:
    """Return a chart of spans of time in seconds, one row per distinct name, with vertical lines at the marks."""
    trace = go.Bar(
        base=begins,
        x=np.subtract(ends, begins),
        y=labels(names),
        orientation="h",
        text=texts,
        textposition="none",
        hovertemplate="%{y}<br>%{text}<extra></extra>",
    )
    figure = _figure([trace], 60 + 22 * len(set(names)))
    figure.update_layout(barmode="overlay", bargap=0.3, showlegend=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_xaxes(title="seconds at work", rangemode="tozero")
    for mark in marks:
        figure.add_vline(mark, line={"width": 1, "dash": "dot", "color": UNNAMED})
    return figure


def _figure(traces: Sequence[Any], height: int) -> go.Figure:
    # Without a template: plotly copies one into every figure, which takes longer than the rest of the figure.
    return go.Figure(list(traces), {"template": "none", "height": height})
