"""The generated pages of the documentation are up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from parity.table import PAGE, page, recorded, rows

from engine.config.documents import given_documents, read_documents
from engine.methods.learned import PAPER, PRESETS, Parameters
from engine.methods.registry import ALIASES, LEARNED, NATIVE
from engine.report import glossary
from engine.search.space import Space

ROOT = Path(__file__).resolve().parent.parent


def test_the_methods_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "-m", "engine.methods.catalog"], cwd=ROOT, capture_output=True, check=True)
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert done.stdout.decode() == page, "python -m engine.methods.catalog > docs/methods.md"
    assert all(f"`{name}`" in page for name in (*LEARNED, *NATIVE, *ALIASES))


def test_the_glossary_is_up_to_date() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert text == glossary.page(), "python -m engine.report.glossary > docs/glossary.md"


def test_the_table_of_presets_has_the_presets_and_the_defaults() -> None:
    lines = (ROOT / "docs" / "published.md").read_text(encoding="utf-8").splitlines()
    assert PRESETS["paper"] == PRESETS["paper/internvl"] and PRESETS["paper/qwen2-vl"] == PRESETS["paper/mistral"]
    for name, value in PAPER.items():
        values = getattr(Parameters(), name), value, PRESETS["paper/mistral"][name]
        cells = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        assert f"| `{name}` | {' | '.join(cells)} |" in lines


def test_the_figures_of_methods_are_those_of_the_quality_benchmark() -> None:
    text = (ROOT / "benchmarks" / "quality" / "README.md").read_text(encoding="utf-8")
    measured = {row[1].strip(): row[8].split()[0] for row in (line.split("|") for line in text.splitlines()) if row[9:]}
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = [row for row in (line.split("|") for line in page.splitlines()) if len(row) == 6 and "0." in row[3]]
    shown = {name: figure for row in rows for name, figure in zip(names(row[2]), row[3].split(","), strict=True)}
    assert len(shown) == 9
    for name, figure in shown.items():
        assert measured[name] == figure.strip(), name


def names(cell: str) -> list[str]:
    """Return the methods that a cell of docs/choosing.md names."""
    return re.findall(r"`(\w+)`", cell) or ["mixture"]


@pytest.mark.thorough
def test_the_table_of_what_a_merge_takes_is_the_plans() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/needs.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8"), "python benchmarks/needs.py"


def test_the_figures_of_mergekits_configs_are_those_recorded() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(recorded()) in text, "make mergekit-parity ARGS=--record"
    _, wanted, accepted, equal = rows(recorded())[0]
    assert f"{accepted} of {wanted}" in text and f"{equal} of {wanted}" in text
    assert f"{accepted} of {wanted}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)?", text, re.MULTILINE)
    parts = {part.strip() for pair in messages for message in pair for part in message.split("…")} - {""}
    assert len(parts) > 40
    sources = [file for folder in ("engine", "actors", "cluster") for file in (ROOT / folder).rglob("*.py")]
    files = [ROOT / "tests" / "golden" / "messages.txt", *sources]
    known = " ".join(file.read_text(encoding="utf-8") for file in files)
    assert sorted(part for part in parts if part not in known) == []


def test_every_option_has_a_default_and_a_description() -> None:
    for method in (*LEARNED.values(), *NATIVE.values()):
        assert method.summary and method.source and method.formula
        for option in method.options:
            assert len(option.about) > 5
            if option.required:
                assert option.default is None
            elif option.name != "hidden_layers":
                assert option.value(option.default) == option.default


def test_the_example_of_a_search_is_valid() -> None:
    (document,) = read_documents(ROOT / "examples" / "quickstart" / "search.yaml")
    search = document.config({}).search
    assert search is not None and search.rungs > 1
    space = Space.of(document, search)
    space.check()
    assert space.given() is not None, "the first trial has the values of the config"
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    assert f"{search.trials} trials" in page
    assert all(f"| `{key}` |" in page for key in type(search).model_fields)
    blocks = re.findall(r"```yaml\n(merge_method.*?)```", page, flags=re.DOTALL)
    assert blocks and all(given_documents(block)[0].config({}).search is not None for block in blocks)
