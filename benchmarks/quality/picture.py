"""Render a report, or one of its sections, to a PNG in a real browser.

    python benchmarks/quality/picture.py merged/merge/report.html report.png --section "Coefficients of stage 2"

The tests of reports use the same browser. Needs playwright (in the dev extra) and a Chromium on the PATH.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from PIL import Image
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Largest size of a picture in a README, in bytes.
LIMIT = 300_000


def find_browser() -> str | None:
    """Return the path of a Chromium, or None if there is none on the PATH."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Start a headless Chromium for the duration of the context."""
    with sync_playwright() as playwright:
        # --no-sandbox: the sandbox needs user namespaces, which containers lack; only our own files are opened.
        started = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


@click.command(help=__doc__)
@click.argument("report", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--section", help="The heading of the section to show. Default: the whole page.")
@click.option("--width", default=1100, show_default=True, help="Width of the window in pixels.")
@click.option("--height", help="Largest height of the picture in pixels.", type=click.IntRange(1))
@click.option(
    "--colours", default=128, show_default=True, type=click.IntRange(2, 256), help="Fewer colours give a smaller file."
)
def main(report: Path, out: Path, section: str | None, width: int, height: int | None, colours: int) -> None:
    if find_browser() is None:
        sys.exit(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with browser() as started:
        page = started.new_page(viewport={"width": width, "height": 900})
        page.goto(report.resolve().as_uri())
        page.locator("html[data-drawn]").wait_for(state="attached")
        if section is None:
            shot = page.screenshot(full_page=True)
        else:
            heading = page.get_by_role("heading", name=section, exact=True)
            shot = page.locator("section").filter(has=heading).first.screenshot()
    picture = Image.open(io.BytesIO(shot))
    picture = picture.crop((0, 0, picture.width, min(picture.height, height or picture.height)))
    small = io.BytesIO()
    picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    if small.tell() > LIMIT:
        sys.exit(f"{small.tell():,} bytes, more than {LIMIT:,}: show one --section, less --height, or fewer --colours")
    out.write_bytes(small.getvalue())


if __name__ == "__main__":
    main()
