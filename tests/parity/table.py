"""The verdicts of all configs, and how many configs of each feature are accepted and equal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.features import features

HERE = Path(__file__).resolve().parent
# The verdict of every config as of the last run with --record.
VERDICTS = HERE / "verdicts.json"
PAGE = HERE.parent.parent / "docs" / "mergekit.md"
BEGIN, END = "<!-- by `make mergekit-parity ARGS=--record` -->", "<!-- end of the table -->"
REFUSED, BOTH_REFUSE = "refused", "refused by mergekit"


def index() -> dict[str, dict[str, Any]]:
    """Return, by the name of a config: its tool (`yaml`, `multi`, `moe`), the kind of its models, and their names."""
    found: dict[str, dict[str, Any]] = json.loads((HERE / "index.json").read_text(encoding="utf-8"))
    return found


def recorded() -> dict[str, str]:
    """Return the recorded verdict of every config."""
    found: dict[str, str] = json.loads(VERDICTS.read_text(encoding="utf-8"))
    return found


def record(verdicts: Mapping[str, str]) -> None:
    """Store verdicts, beside those of the other configs, and write the table of docs/mergekit.md."""
    kept = recorded() if VERDICTS.exists() else {}
    text = json.dumps(dict(sorted((kept | dict(verdicts)).items())), indent=1, ensure_ascii=False)
    VERDICTS.write_text(f"{text}\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(recorded())}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def rows(found: Mapping[str, str]) -> list[tuple[str, int, int, int]]:
    """Return for each feature how many configs mergekit runs, how many of these are accepted, and how many equal."""
    counts: dict[str, Counter[str]] = {}
    for name, verdict in found.items():
        text = (HERE / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        for feature in ["all", *features(text, index()[name]["tool"])]:
            counts.setdefault(feature, Counter()).update(_counted(verdict))
    ordered = sorted(counts.items(), key=lambda item: (item[0].startswith("method"), -item[1]["mergekit"], item[0]))
    return [(feature, of["mergekit"], of["accepted"], of["equal"]) for feature, of in ordered if of["mergekit"]]


def table(found: Mapping[str, str]) -> str:
    """Return the table by feature, and the configs that are not equal."""
    lines = [f"{'feature':30} {'mergekit':>9} {'accepted':>9} {'equal':>9}"]
    lines += [f"{feature:30} {wanted:9} {accepted:9} {equal:9}" for feature, wanted, accepted, equal in rows(found)]
    others = {name: verdict for name, verdict in found.items() if verdict != "equal"}
    return "\n".join([*lines, "", *(f"{name}: {verdict}" for name, verdict in sorted(others.items()))])


def page(found: Mapping[str, str]) -> str:
    """Return the table of docs/mergekit.md."""
    lines = ["| feature | mergekit runs | accepted | equal |", "|---|---|---|---|"]
    lines += [f"| {feature} | {wanted} | {accepted} | {equal} |" for feature, wanted, accepted, equal in rows(found)]
    return "\n".join(lines)


def _counted(verdict: str) -> list[str]:
    if BOTH_REFUSE in verdict:
        return []
    accepted = ["accepted"] if verdict.startswith(("equal", "differs")) else []
    return ["mergekit", *accepted, *(["equal"] if verdict.startswith("equal") else [])]
