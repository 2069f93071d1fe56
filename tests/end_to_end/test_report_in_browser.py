"""Reports in a real browser, dark and light, wide and narrow: every chart is drawn, and only the file is requested."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import plan_of
from recorded_merges import write_merge

from benchmarks.quality.picture import browser, find_browser
from engine.report.page import write_report

HOSTILE = "</script><script>alert(1)</script>"
# For each chart, the number of its traces and the number of traces drawn.
DRAWN = """Array.from(document.querySelectorAll('.chart'), chart => [
    chart.data.length, chart.querySelectorAll('.heatmaplayer image, .scatterlayer .trace, .barlayer .trace').length
])"""
# The brightness of ink and background of the page and of the charts, and of the colour at 0 in the heatmap.
LOOK = """(() => {
    const bright = colour => {
        const pen = document.createElement('canvas').getContext('2d')
        pen.fillStyle = colour
        pen.fillRect(0, 0, 1, 1)
        return pen.getImageData(0, 0, 1, 1).data.slice(0, 3).reduce((sum, part) => sum + part / 765, 0)
    }
    const style = getComputedStyle(document.body), layout = document.querySelector('.chart')._fullLayout
    const behind = bright(style.backgroundColor), scale = document.querySelector('.chart')._fullData[0].colorscale
    return {
        'page': [bright(style.color), behind],
        'chart': [bright(layout.font.color), behind],
        'around zero': bright(scale[(scale.length - 1) / 2][1]),
    }
})()"""
# Wait until every chart is as wide as its container, and return whether the page is as wide as the window. Playwright's
# own waiting evaluates text, which the page's content security policy forbids.
SETTLED = """() => new Promise(done => {
    const fits = chart => Math.abs(chart.querySelector('.main-svg').clientWidth - chart.parentNode.clientWidth) < 2
    const look = () => Array.from(document.querySelectorAll('.chart')).every(fits)
        ? done(document.documentElement.scrollWidth === innerWidth) : requestAnimationFrame(look)
    look()
})"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None and "REQUIRE_BROWSER" not in os.environ, reason="there is no Chromium on the PATH"
    ),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@contextmanager
def opened(chromium: Any, page_file: Path) -> Iterator[Any]:
    """Open a page, wait for its charts, and check at the end that it logged nothing and requested only its own file."""
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    messages: list[str] = []
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    page.locator("html[data-drawn]").wait_for(state="attached")
    yield page
    page.close()
    assert messages == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]


def all_drawn(page: Any) -> int:
    """Return the number of charts, after checking that each has drawn all its traces."""
    drawn = page.evaluate(DRAWN)
    assert all(traces == shown > 0 for traces, shown in drawn), drawn
    assert page.locator(".js-plotly-plot .main-svg:first-child").count() == len(drawn)
    return len(drawn)


def test_a_merge_is_drawn_on_a_desk_and_on_a_phone(chromium: Any, llama_merge: Path, tmp_path: Path) -> None:
    plan = plan_of(llama_merge, f"models.0.name={json.dumps(HOSTILE)}", "models.1.name='2024-01-01'")
    write_report([str(write_merge(plan, tmp_path / "out"))], tmp_path / "report.html")
    with opened(chromium, tmp_path / "report.html") as page:
        assert all_drawn(page) == 2 + 3 + 4 + 2, "stages; importance; two losses a stage; times and memory"
        assert page.locator("table").get_by_text(HOSTILE, exact=True).count() == 2, "in the summary, and as an expert"
        ticks = page.locator(".js-plotly-plot").first.locator(".ytick text").all_text_contents()
        assert sorted(tick[-25:] for tick in ticks) == ["2024-01-01", HOSTILE[-25:]]
        axis = "document.querySelector('#losses .chart')._fullLayout.yaxis.type"
        assert page.evaluate(axis) == "linear"
        page.get_by_label("logarithmic").first.check()
        assert page.evaluate(axis) == "log"
        assert page.locator(".modebar-btn").count() == 0
        assert "differ" in page.locator("#summary abbr").first.get_attribute("title")
        looks = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width, kind in ((1280, "wide"), (390, "narrow")):
                page.set_viewport_size({"width": width, "height": 800})
                page.locator(f"html[data-drawn='{scheme} {kind}']").wait_for(state="attached")
                assert page.evaluate(SETTLED), "nothing overflows the window"
            assert all_drawn(page) == 11
            assert page.evaluate(axis) == "log", "the axis stays as it was"
            looks.append(page.evaluate(LOOK))
        light, dark = looks
        assert all(ink < 0.4 < 0.6 < behind for ink, behind in (light["page"], light["chart"])), light
        assert all(behind < 0.4 < 0.6 < ink for ink, behind in (dark["page"], dark["chart"])), dark
        assert light["around zero"] > 0.9 and dark["around zero"] < 0.2


@pytest.mark.thorough
def test_runs_side_by_side_are_drawn(chromium: Any, llama_merge: Path, tmp_path: Path) -> None:
    first = write_merge(plan_of(llama_merge), tmp_path / "first")
    second = write_merge(plan_of(llama_merge, "parameters.learning_rate=0.3"), tmp_path / "second", scale=0.5, seed=1)
    write_report([str(first), str(second)], tmp_path / "report.html")
    with opened(chromium, tmp_path / "report.html") as page:
        assert all_drawn(page) == 4 + 1 + 2 * 11
        page.get_by_role("link", name="second", exact=True).click()
        assert page.locator("details.run").count() == 2
        assert page.get_by_text("parameters.learning_rate").first.is_visible()
