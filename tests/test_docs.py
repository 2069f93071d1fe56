"""The generated pages of the documentation are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from parity.table import PAGE, page, recorded, rows

from engine.methods.registry import ALIASES, LEARNED, NATIVE

ROOT = Path(__file__).resolve().parent.parent


def test_the_methods_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "-m", "engine.methods.catalog"], cwd=ROOT, capture_output=True, check=True)
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert done.stdout.decode() == page, "python -m engine.methods.catalog > docs/methods.md"
    assert all(f"`{name}`" in page for name in (*LEARNED, *NATIVE, *ALIASES))


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
