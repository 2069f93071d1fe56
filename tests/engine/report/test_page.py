"""The report shows the values that the merge wrote, and names from outside cannot inject HTML."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pydantic
import pytest
from click.testing import CliRunner
from conftest import plan_of
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import Store
from plotly.offline import get_plotlyjs_version
from recorded_merges import MEMORY, checked, write_merge
from thorough import as_thorough

import cli
from engine.errors import ConfigError
from engine.evaluation.results import Row, save_results
from engine.report import sections as report_sections
from engine.report.charts import Blocks, ends, labels, lines
from engine.report.comparison import comparison
from engine.report.drawing import VERSION, library
from engine.report.glossary import explained
from engine.report.merge_folder import Memory, Merged
from engine.report.page import report_html
from engine.report.parts import ReportSection, duration, moment, number, share
from engine.report.sections import coefficient_charts, key_figures, sections_of
from engine.report.summary import summary
from engine.statistics.fits import FITS, LayerFit
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.coefficients import (
    SPECTRAL,
    ChunkLayout,
    Coefficients,
    read_coefficients,
    write_coefficients,
)

HOSTILE = "</script><script>alert(1)</script>"
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


class Page(HTMLParser):
    """The tags of a page, their texts, and the contents of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        # The tag of each id, and the ids that links lead to.
        self.anchors: dict[str, str] = {}
        self.links: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.anchors |= {value or "": tag for name, value in attrs if name == "id"}
        self.links += [(value or "").removeprefix("#") for name, value in attrs if name == "href" and tag == "a"]

    def handle_data(self, data: str) -> None:
        inside = self.scripts if self.tags and self.tags[-1] == "script" and data.strip() else self.texts
        inside.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")


@pytest.fixture
def merged(llama_merge: Path, tmp_path: Path) -> Path:
    return write_merge(plan_of(llama_merge), tmp_path / "merged")


def charts_of(sections: Sequence[ReportSection], title: str) -> list[Any]:
    section = next(section for section in sections if section.title == title)
    return [chart.figure for chart in section.charts]


def on_heatmaps(figures: list[Any], names: list[str], blocks: Blocks) -> dict[tuple[str, str], float]:
    """Return (expert, kind · block) → colour, from one heatmap per expert or a single one of all experts."""
    found = {}
    for name, figure in zip(names, figures, strict=False):
        trace = figure.data[0]
        for row, down in enumerate(trace.y):
            for column, across in enumerate(trace.x):
                key = (down, across) if len(figures) == 1 else (name, f"{across} · {down}")
                if not np.isnan(trace.z[row][column]):
                    found[key] = float(trace.z[row][column])
    return found


@pytest.mark.thorough
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 14), st.integers(1, 16), st.integers(0, 2), st.data())
def test_the_heatmaps_show_every_coefficient_in_its_cell(
    experts: int, blocks: int, outside: int, data: st.DataObject
) -> None:
    tensors = [f"model.layers.{b}.{kind}.weight" for b in range(blocks) for kind in KINDS if (b, kind) != (0, KINDS[1])]
    tensors += [f"projector.linear_{number}.weight" for number in range(outside)]
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    layout = ChunkLayout.make(dict.fromkeys(tensors, 60), {name: int(generator.integers(0, 6)) for name in tensors})
    priors = generator.uniform(0.1, 0.9, experts)
    table = Coefficients(layout, generator.uniform(0, 1, (experts, layout.width)))
    names = [f"expert {k}" for k in range(experts)]
    charts = coefficient_charts(table, names, priors)

    away = table.per_tensor() - priors[:, None]
    where = Blocks.of(tensors)
    short = where.names(tensors)
    wanted = {(name, short[place]): away[k, place] for k, name in enumerate(names) for place in range(len(tensors))}
    faceted = experts <= report_sections.FACETS and len(tensors) > report_sections.TENSORS
    assert len(charts) == (experts + bool(outside) if faceted else 1)
    rest = charts[experts:] if faceted else []
    found = on_heatmaps([chart.figure for chart in charts[: experts if faceted else 1]], names, where)
    if faceted and experts == 1:
        found = {(names[0], f"{across} · {down}"): value for (down, across), value in found.items()}
    for chart in rest:
        found |= on_heatmaps([chart.figure], names, where)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[key] for key in wanted], list(wanted.values()), rtol=1e-5, atol=1e-6)
    # One scale for all experts, around the prior.
    scales = {(chart.figure.data[0].zmin, chart.figure.data[0].zmax) for chart in charts}
    assert scales == {(-np.abs(away).max(), np.abs(away).max())}


def test_the_page_shows_the_values_of_the_parquet_files(merged: Path) -> None:
    merge, record = Merged.read(str(merged)), merged / "merge"
    sections = sections_of(merge)
    rows = pyarrow.parquet.read_table(record / "coefficients.parquet").to_pylist()
    for stage in (1, 2):
        (figure,) = charts_of(sections, f"Coefficients of stage {stage}")
        trace = figure.data[0]
        for expert, prior in (("expert0", 0.2), ("expert1", 0.3)):
            row = trace.y.index(expert)
            of = {
                t: [r for r in rows if (r["stage"], r["model"], r["tensor"]) == (stage, expert, t)]
                for t in merge.stages[stage].layout.tensors
            }
            for tensor, mine in of.items():
                kind, block = tensor.split(".")[-2], tensor.split(".")[2]
                column = trace.x.index(f"{block} · {kind}")
                values = [r["value"] for r in mine]
                assert trace.z[row][column] == pytest.approx(np.mean(values) - prior, abs=1e-6)
                told = trace.text[row][column]
                assert all(f"{value:.4f}" in told for value in values), "the hover has every chunk's value"
                assert ("fixed" in told) == (not mine[0]["learned"])

    table = pyarrow.parquet.read_table(record / "importance.parquet").to_pydict()
    importance, chunks, top = charts_of(sections, "Importance and chunks")
    for tensor, part, count in zip(table["tensor"], table["importance"], table["chunks"], strict=True):
        block, kind = int(tensor.split(".")[2]), tensor.split(".")[-2]
        cell = importance.data[0].y.index(kind), importance.data[0].x.index(str(block))
        assert importance.data[0].z[cell] == pytest.approx(part, rel=1e-6) and chunks.data[0].z[cell] == count
    assert list(top.data[0].x) == pytest.approx(sorted((100 * s for s in table["importance"]), reverse=True)[:20])

    figures = dict(key_figures(merge))
    assert figures["change left by rounding"] == "67 %, nearest"
    (memory,) = charts_of(sections, "Memory and traffic")
    assert dict(zip(memory.data[0].y, memory.data[0].x, strict=True)) == {
        actor["role"]: actor["peak_anonymous_bytes"] / 1e9 for actor in MEMORY["actors"]
    }


def test_the_layers_that_leave_most_come_first(llama_merge: Path, tmp_path: Path) -> None:
    plan = plan_of(llama_merge, "parameters.task_vectors=orthogonal")
    energies = {name: float(number) for number, name in enumerate(plan.merged, 1)}
    fits = {name: LayerFit((0.25, -0.5), energy, 0.5) for name, energy in energies.items()}
    first = plan.merged[0]
    fits[first] = replace(fits[first], energy=4.0, residual=1.0)
    merge = Merged.read(str(write_merge(plan, tmp_path / "merged", fits=fits)))
    assert merge.fits == fits
    left = {name: fit.energy * fit.residual for name, fit in fits.items()}
    change, total = sum(fit.energy for fit in fits.values()), sum(left.values())
    section = next(one for one in sections_of(merge) if one.title == "How near sums of task vectors come")
    (table,) = section.tables
    assert table.head[-2:] == ["expert0", "expert1"] and len(table.rows) == min(20, len(fits))
    wanted = sorted(left, key=lambda name: -left[name])[:20]
    kinds = [f"{name.split('.')[2]} · {name.split('.')[-2]}" for name in wanted]
    assert [row[0] for row in table.rows] == kinds
    for name, row in zip(wanted, table.rows, strict=True):
        fit = fits[name]
        assert row[1:] == pytest.approx([fit.energy / change, fit.residual, left[name] / total, 0.25, -0.5])
    assert dict(key_figures(merge))["residual of sums of task vectors"] == share(total / change)
    assert share(total / change) in section.text and "orthogonal" in section.text
    weight_space = replace(merge, config=plan_of(llama_merge, "merge_method=closed_form").config, stages={})
    assert not any("orthogonal" in one.text for one in sections_of(weight_space))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"{1 - total / change:.1%}" in card and "merge/layers.parquet" in card


@pytest.mark.parametrize("change", ["no energy", "not finite", "swapped", "twice", "null", "cut", "no rows"])
def test_layers_of_other_experts_or_with_odd_numbers(llama_merge: Path, tmp_path: Path, change: str) -> None:
    plan = plan_of(llama_merge)
    fits = {name: LayerFit((0.25, 0.5), 1.0, 0.5) for name in plan.merged}
    path = write_merge(plan, tmp_path / "merged", fits=fits) / "merge" / "layers.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    changes: dict[str, list[dict[str, Any]]] = {
        "no energy": [row | {"energy": 0.0} for row in rows],
        "not finite": [row | {"energy": float("nan"), "residual": float("inf"), "tensor": HOSTILE} for row in rows[:2]],
        "swapped": rows[::-1],
        "twice": [*rows, *rows[:2]],
        "null": [row | {"coefficient": None} for row in rows],
        "cut": rows[:-1],
        "no rows": [],
    }
    table = pyarrow.Table.from_pylist(changes[change], schema=FITS)
    pyarrow.parquet.write_table(table, path)
    if change in ("no energy", "not finite", "no rows"):
        page = report_html([Merged.read(str(tmp_path / "merged"))])
        path.unlink()
        plain = report_html([Merged.read(str(tmp_path / "merged"))])
        assert Page(page).tags.count("script") == Page(plain).tags.count("script")
    else:
        with refused(ConfigError, where="layers.parquet", facts=["expert0, expert1"]):
            Merged.read(str(tmp_path / "merged"))


def test_times_are_of_all_starts_without_the_time_between_them(merged: Path) -> None:
    merge = Merged.read(str(merged))
    assert dict(key_figures(merge))["time"] == "9.0 s, in 2 starts"
    section = next(section for section in sections_of(merge) if section.title == "Times")
    assert dict(section.tables[0].rows) == {"targets": "1.5 s", "stage 1": "5.0 s, in 2 parts", "stage 2": "2.0 s"}
    assert "1 min 00 s" in section.text, "it stood still"
    bars = section.charts[0].figure.data[0]
    spans = zip(bars.y, bars.base, np.add(bars.base, bars.x), strict=True)
    assert list(spans) == [("targets", 0.5, 2), ("stage 1", 1, 5), ("stage 1", 5.5, 6.5), ("stage 2", 6.5, 8.5)]
    # Earlier versions recorded the seconds of phases alone.
    older = replace(merge, memory=replace(merge.memory, starts=()))
    (times,) = [section for section in sections_of(older) if section.title == "Times"]
    assert dict(times.tables[0].rows) == {"stage 1": "1.0 s", "stage 2": "2.0 s"} and not times.charts
    assert "time" not in dict(key_figures(older))


def test_the_summary_says_how_near_each_expert_is(merged: Path) -> None:
    merge = Merged.read(str(merged))
    found = summary(merge)
    # kl is 1 to 8 in the order of the visits: expert0's samples begin at 1 and 3 and end at 5 and 7.
    (_, *first), (_, *second) = found.tables[0].rows
    assert first == pytest.approx([3.0, 2.0, 6.0, 3.0, 0.2, 0.6]) and second[:3] == [4.0, 2.0, 8.0]
    assert any("300 %" in point and "expert0, the nearest" in point for point in found.points)
    grown, farther, rounded = found.warnings
    assert "KL divergence of expert0, expert1" in grown and "hidden loss of expert0, expert1" in farther
    assert "67 %" in rounded


def test_summary_and_card_name_the_experts_that_are_lost(llama_merge: Path, tmp_path: Path) -> None:
    for name, end, lost, options in (("kept", 1.0, [], []), ("lost", 1.9, ["expert1"], ["calibrate=[featcal]"])):
        plan = plan_of(llama_merge, *options)
        merged = write_merge(plan, tmp_path / name, end=checked(plan, end))
        found = summary(Merged.read(str(merged)))
        assert [warning.partition(" ")[0] for warning in found.warnings if "is lost" in warning] == lost
        table = found.tables[-1]
        assert [list(row) for row in table.rows] == [
            ["expert0", 0.75, 2.0, 0.5],
            ["expert1", pytest.approx(1 - end / 2), 2.0, end],
        ]
        card = (merged / "README.md").read_text().partition("## Use it")[0]
        assert "| expert0 | 2 | 0.5 | 75% |" in card and f"| expert1 | 2 | {end:.3g} | {1 - end / 2:.0%} |" in card
        assert ("before featcal" in table.title) == ("Before featcal" in card) == bool(options)


def test_the_summary_warns_of_what_needs_attention(merged: Path) -> None:
    merge = Merged.read(str(merged))
    assert merge.memory is not None and merge.survived is not None
    quiet = replace(merge, metrics=None, survived=replace(merge.survived, rounding="stochastic"))
    assert summary(quiet).warnings == [] and summary(quiet).tables == []
    trouble = {
        "left_out": {"expert0": 0.05, "expert1": 0.25},
        "decompositions_by_lapack": 3,
        "not_deterministic": ("cumsum",),
        "lost_attempts": 2,
        "doubts": ("expert0 is damaged",),
    }
    warnings = summary(replace(quiet, memory=replace(merge.memory, **trouble))).warnings
    facts = ("expert0 is damaged.", "25 % of the squared change of expert1", "3 matrices", "cumsum", "2 times")
    assert len(warnings) == 5 and all(fact in line for fact, line in zip(facts, warnings, strict=True))


def test_numbers_are_as_a_person_reads_them() -> None:
    nan = float("nan")
    assert [number(n) for n in (3, 12345, 0.0123456, 5.0, 1234.5, 0.00001, nan)] == [
        *("3", "12,345", "0.0123", "5", "1,234", "1e-05", "–")
    ]
    assert [share(n) for n in (0.671, 0.0123, 0.0999, 12.0, 0.0, nan)] == [
        "67 %",
        "1.2 %",
        "10 %",
        "1,200 %",
        "0 %",
        "–",
    ]
    assert [duration(n) for n in (0.04, 9.96, 59.6, 61, 3599.7, 7500)] == [
        *("0.0 s", "10 s", "1 min 00 s", "1 min 01 s", "1 h 00 min", "2 h 05 min")
    ]
    assert moment("2026-01-31T12:00:30+00:00") == "2026-01-31 12:00 UTC" and moment("yesterday") == "yesterday"


def test_the_library_is_the_one_of_plotlys_version() -> None:
    unpacked = gzip.decompress(base64.b64decode(library())).decode()
    assert f"plotly.js (cartesian - minified) v{VERSION}" in unpacked[:200]
    assert get_plotlyjs_version() == VERSION, "replace engine/report/assets as engine/report/drawing.py says"


def test_of_many_lines_the_highest_are_named() -> None:
    curves = {f"e{k}": ([0, 1], [1.0, float(k % 20)]) for k in range(32)}
    figure = lines(curves, "loss")
    assert [trace.name for trace in figure.data if trace.showlegend] == ["e19", "e18", "e17"]
    assert len(figure.data) == 32 and len({trace.line.color for trace in figure.data}) == 4


def test_the_key_figures_name_the_fullest_gpu(merged: Path) -> None:
    merge = Merged.read(str(merged))
    assert "fullest GPU" not in dict(key_figures(merge))
    gpus = [{"name": "H200", "peak_allocated_bytes": n, "peak_reserved_bytes": 2 * n} for n in (40 * 10**9, 10**9)]
    actors = [actor | ({"gpus": gpus} if actor["role"] == "trainer" else {}) for actor in MEMORY["actors"]]
    content = json.dumps(MEMORY | {"actors": actors})
    memory = pydantic.TypeAdapter(Memory).validate_json(content)
    shown = dict(key_figures(replace(merge, memory=memory)))
    assert all(fact in shown["fullest GPU"] for fact in ("40.0 GB", "trainer", "H200"))


def test_losses_by_hand(merged: Path) -> None:
    merge = Merged.read(str(merged))
    assert merge.losses() == {1: ["kl", "hidden"], 2: ["kl", "hidden"]}
    # kl is 1, 2, 3, 4 in stage 1: expert0's samples 0 and 1, each seen once, and expert1's one sample, seen twice.
    assert merge.first_and_last(1, "kl") == {"expert0": (2, 2), "expert1": (2, 4)}
    kl = charts_of(sections_of(merge), "Losses")[0]
    assert {t.name: (list(t.x), list(t.y)) for t in kl.data} == {
        "expert0": ([1, 2], [1, 3]),
        "expert1": ([1, 2], [2, 4]),
    }
    assert merge.mean_curve(1, "kl").values == [1.5, 3.5]


@pytest.mark.parametrize(
    "name", [HOSTILE, *map(as_thorough, ('<img src=x onerror="alert(1)">', "{{ 7 * 7 }} & <b>x</b>", "%{x} ${y}"))]
)
def test_a_hostile_name_adds_no_tags_or_scripts(llama_merge: Path, tmp_path: Path, name: str) -> None:
    plain = report_html([Merged.read(str(write_merge(plan_of(llama_merge), tmp_path / "plain")))])
    hostile = plan_of(llama_merge, f"models.0.name={json.dumps(name)}")
    page = Page(report_html([Merged.read(str(write_merge(hostile, tmp_path / "hostile")))]))
    assert page.tags == Page(plain).tags, "the name adds no tags"
    assert name in page.texts
    *figures, _, _, _ = page.scripts  # templates, library, drawing
    assert len(figures) == 11 and not any("<" in script for script in figures)


def test_labels_are_escaped_shortened_and_distinct(merged: Path) -> None:
    assert labels(["a<b", "x" * 30]) == ["a&lt;b", "…" + "x" * 25]
    alike = ["a" + "x" * 30, "b" + "x" * 30]
    assert labels(alike) == alike, "cut, they would be one"
    figure = charts_of(sections_of(Merged.read(str(merged))), "Coefficients of stage 1")[0]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category", "a name may look like a date"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.from_regex(r"[ab](\.[ab]){0,3}(\.weight)?", fullmatch=True), min_size=1, max_size=8, unique=True))
def test_short_names_are_unique_suffixes(names: list[str]) -> None:
    short = ends(names)
    assert len(set(short)) == len(names)
    assert all(
        name.removesuffix(".weight").endswith(end) or name.endswith(end) for name, end in zip(names, short, strict=True)
    )


def test_the_words_of_the_glossary_are_explained_once() -> None:
    shown = str(explained("Coefficients, a coefficient & `prior` of <b>: the prior"))
    assert shown.count("<abbr title=") == 2 and ">Coefficients</abbr>, a coefficient &amp; <code>prior</code>" in shown
    assert "<b>" not in shown and shown.endswith(">prior</abbr>")


def test_two_stacks_of_blocks_and_a_tensor_outside() -> None:
    tensors = [f"{stack}.layers.{b}.q_proj.weight" for stack in ("vision", "language") for b in (0, 10, 2)] + [
        "gate.weight"
    ]
    blocks = Blocks.of(tensors)
    assert blocks.kinds == ["vision.layers.*.q_proj", "language.layers.*.q_proj"] and blocks.blocks == [0, 2, 10]
    assert blocks.cells.tolist() == [[0, 2, 1], [3, 5, 4]] and blocks.outside == [6]
    assert blocks.in_order() == [0, 3, 2, 5, 1, 4, 6]
    assert blocks.names(tensors)[-2:] == ["2 · language.layers.*.q_proj", "gate"]


@pytest.mark.parametrize(
    ("gone", "titles"),
    [
        (["coefficients.parquet", "importance.parquet", "metrics.parquet"], ["Times", "Memory and traffic"]),
        (["coefficients.parquet", "importance.parquet", "metrics.parquet", "memory.json"], []),
        (
            ["importance.parquet"],
            ["Coefficients of stage 1", "Coefficients of stage 2", "Losses", "Times", "Memory and traffic"],
        ),
    ],
)
def test_sections_without_data_are_left_out(merged: Path, gone: list[str], titles: list[str]) -> None:
    for name in gone:
        (merged / "merge" / name).unlink()
    merge = Merged.read(str(merged))
    assert [section.title for section in sections_of(merge)] == ["Key figures", "Experts", *titles]
    page = Page(report_html([merge]))
    assert [page.anchors[link] for link in page.links] == ["section"] * (len(titles) + 4) + ["details"]


def test_a_comparison_shows_the_differences(llama_merge: Path, tmp_path: Path) -> None:
    first = write_merge(plan_of(llama_merge), tmp_path / "first")
    other = plan_of(llama_merge, "parameters.learning_rate=0.3", "models.1.parameters.weight=0.25", "seed=3")
    runs = {
        name: Merged.read(str(path))
        for name, path in (("first", first), ("second", write_merge(other, tmp_path / "second", 0.5)))
    }
    found, options, figures, losses, coefficients = comparison(runs)
    assert any("second with 3.5; first 7" in point for point in found.points)
    assert options.tables[0].rows == [
        ["models.expert1.parameters.weight", str(0.2 + 0.1), "0.25"],
        ["parameters.learning_rate", "0.1", "0.3"],
        ["seed", "0", "3"],
    ]
    assert figures.tables == [] or all(len(set(row[1:])) > 1 for row in figures.tables[0].rows)
    assert figures.folded is not None and ["method", "expert_merging_pp"] in figures.folded.rows
    assert losses.tables[0].rows == [["expert0", 6.0, 3.0], ["expert1", 8.0, 4.0]]
    assert {t.name: list(t.y) for t in losses.charts[0].figure.data} == {"first": [1.5, 3.5], "second": [0.75, 1.75]}
    bars = {trace.name: list(trace.y) for trace in coefficients.charts[0].figure.data}
    for name, merge in runs.items():
        learned = merge.stages[2].values[:, merge.stages[2].layout.learned_columns]
        assert bars[name] == pytest.approx(learned.mean(axis=1))
    with refused(ConfigError, where=runs["first"].where):
        report_html([runs["first"], runs["first"]])


def test_scores_stand_beside_each_other(llama_merge: Path, tmp_path: Path) -> None:
    folders = [write_merge(plan_of(llama_merge), tmp_path / name) for name in ("first", "second")]
    for folder, value in zip(folders, (0.5, 0.75), strict=True):
        rows = [Row("base", "math", "accuracy", 0.25, 40), Row("merged", "math", "accuracy", value, 40)]
        rows += [Row("/home/alice/best", data, "f1", value, 7, "/home/alice/math") for data in ("a", "b")]
        rows += [Row("/home/alice/math", data, "f1", 0.8, 7, "/home/alice/math") for data in ("a", "b")]
        save_results(rows, LocalFolder(folder / "merge"), "evaluation.parquet")
    page = Page(report_html([Merged.read(str(folder)) for folder in folders])).texts
    at = page.index("accuracy")
    cells = [text for text in page[at : at + 60] if text.strip()]
    assert cells[:9] == [
        "accuracy",
        "model",
        "math (40)",
        "base",
        "0.25",
        "first: merged",
        "0.5",
        "second: merged",
        "0.75",
    ]
    at = page.index("f1")
    cells = [text for text in page[at : at + 80] if text.strip()]
    assert cells[1:6] == ["model", "a (7, expert: math)", "b (7, expert: math)", "mean", "% of the experts"]
    assert cells[6:11] == ["first: best", "0.5", "0.5", "0.5", "62.5"]

    out = tmp_path / "one.html"
    more = folders[1] / "merge" / "evaluation.parquet"
    done = CliRunner().invoke(cli.main, ["report", str(folders[0]), "--out", str(out), "--evaluation", str(more)])
    assert done.exit_code == 0 and done.output == f"wrote {out}\n"
    assert "evaluation.parquet: merged" in Page(out.read_text()).texts


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("coefficients.parquet", b"PAR1 no", "ArrowInvalid"),
        ("metrics.parquet", None, "ArrowInvalid"),
        ("importance.parquet", b"", "ArrowInvalid"),
        ("layers.parquet", None, "ArrowInvalid"),
        ("end_check.parquet", None, "ArrowInvalid"),
        ("memory.json", b"{}", "ValidationError"),
        ("config.yaml", b"merge_method: [", "YAML"),
        ("config.yaml", b"merge_method: ties", "KeyError"),
        ("evaluation.parquet", None, "ArrowInvalid"),
    ],
)
def test_a_damaged_file_is_named(merged: Path, tmp_path: Path, name: str, content: bytes | None, cause: str) -> None:
    # None: a parquet file of another kind.
    path = merged / "merge" / name
    path.write_bytes((merged / "merge" / "coefficients.parquet").read_bytes() if content is None else content)
    done = CliRunner().invoke(cli.main, ["report", str(merged), "--out", str(tmp_path / "report.html")])
    assert done.exit_code == 2, done.output
    assert f"error: {path}:" in done.stderr and f"{cause}: " in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_merge_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert f"error: {tmp_path}: " in done.stderr and "merge/config.yaml" in done.stderr


@pytest.mark.parametrize("listed", [b"[", b"7", b"[[]]", b"\xff"])
def test_a_damaged_list_of_spectral_tensors_is_named(merged: Path, listed: bytes) -> None:
    path = merged / "merge" / "coefficients.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({SPECTRAL: listed}), path)
    with refused(ConfigError, where="coefficients.parquet"):
        Merged.read(str(merged))


def test_coefficients_of_other_experts_are_refused(merged: Path) -> None:
    path = merged / "merge" / "coefficients.parquet"
    _, table = read_coefficients(path, 1)
    write_coefficients(path, [table], ["expert1", "expert0"])
    with refused(ConfigError, where=str(path), facts=["expert0, expert1"]):
        Merged.read(str(merged))


def test_a_merge_in_object_storage(store: Store, merged: Path) -> None:
    from engine.storage.paths import open_folder

    there = open_folder(f"{store.root}/merged")
    for file in (merged / "merge").iterdir():
        there.write(f"merge/{file.name}", file.read_bytes())
    here, found = Merged.read(str(merged)), Merged.read(f"{store.root}/merged")
    assert sections_of(found)[0] == sections_of(here)[0]
    with refused(ConfigError, where=f"{store.root}/nothing"):
        Merged.read(f"{store.root}/nothing")
