"""The advice in the record of messages, for tests that hold it against what they follow."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import messages


def recorded(packages: tuple[str, ...]) -> set[str]:
    """Return the texts of `do` of the packages in messages.txt."""
    found = set()
    for section in messages.RECORD.read_text(encoding="utf-8").split("\n\n\n"):
        name, *rest = section.strip().splitlines()
        if name.removeprefix("# ").startswith(packages):
            found |= {line.removeprefix("  do: ") for line in rest if line.startswith("  do: ")}
    return found


def check_all_known(packages: tuple[str, ...], known: Iterable[str]) -> None:
    """Assert that every advice of the packages contains a known text, and every known text is in an advice."""
    advice, parts = recorded(packages), set(known)
    new = {text for text in advice if not any(part in text for part in parts)}
    old = {part for part in parts if not any(part in text for text in advice)}
    assert (new, old) == (set(), set())
