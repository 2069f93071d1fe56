"""The wording of errors stands in one place, tests/golden/messages.txt; other tests assert class, place and facts."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "golden"))

import messages  # noqa: E402 - the recorder beside its record

PROSE = re.compile(r"[a-z]{2,}(?: [a-z']{2,}){2,}")


def test_the_wording_of_every_error_is_recorded() -> None:
    recorded = messages.RECORD.read_text(encoding="utf-8")
    assert messages.record() == recorded, "a message changed: python tests/golden/messages.py, then read the diff"


def test_every_error_says_what_is_wrong() -> None:
    blocks = [block for block in messages.record().split("\n\n") if not block.lstrip().startswith("#")]
    assert len(blocks) > 150
    assert [block for block in blocks if "\n  what: " not in block] == []


def test_no_test_quotes_the_wording() -> None:
    """Three words of prose in a row, in what `pytest.raises` matches, in `facts` or in `do`."""
    quoted = set()
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("match", "facts", "do"):
                texts = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
                quoted |= {(path.name, text) for text in texts if isinstance(text, str) and PROSE.search(text)}
    assert quoted == set()
