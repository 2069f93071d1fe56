"""Print the results of bench B as Markdown: a table for each kind of experts and number of them.

*best scale* is a weight-space method's exact match at its best scale on the test split itself, the scale in brackets:
what it would reach if someone chose its scale with the answers of the test. The other columns are as in `table.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import tasks
from bench_b import ADAPTERS, COUNTS
from fine_tune import MIXTURES
from space import CHOSEN
from table import Line, read_all, spread

NAMES = {"": "full experts", "-r16": "LoRA experts of rank 16", "-r8": "LoRA experts of rank 8"}


def mean_of(line: Line, skills: Sequence[str], what: str = "exact_match") -> float:
    """Return the mean of a line's scores over some skills."""
    return statistics.mean(line[what][skill] for skill in skills)


def rows(lines: Sequence[Line], kind: str, count: int) -> list[tuple[str, list[Line], Line | None]]:
    """Return the rows of one table: a name, its lines, one a seed, and the line of the best scale."""
    which = {"bench": "b", "experts": count} | ({"adapters": kind} if kind else {})
    of_bench = [
        line for line in lines if which.items() <= line["key"].items() and ("adapters" in line["key"]) == bool(kind)
    ]
    found: list[tuple[str, list[Line], Line | None]] = []
    for name in ("base", MIXTURES["b"]):
        found.append((name, [line for line in lines if line["key"] == {"model": name}], None))
    for method, (options, scale) in CHOSEN.items():
        tried = [one for one in of_bench if {"method": method, "options": options}.items() <= one["key"].items()]
        at_chosen = [line for line in tried if line["key"]["scale"] == scale]
        best = max(tried, key=lambda line: sum(line["exact_match"].values()), default=None)
        found.append((f"{method} ({scale})", at_chosen, best))
    for method in ("expert_merging", "expert_merging_pp"):
        found.append((method, [line for line in of_bench if line["key"].get("method") == method], None))
    return found


def print_table(lines: Sequence[Line], kind: str, count: int) -> None:
    """Print the table of a kind and number of experts; nothing if their scores are missing."""
    skills = list(tasks.BENCHES["b"])[:count]
    own = {
        skill: line["exact_match"][skill]
        for skill in skills
        for line in lines
        if line["key"] == {"model": skill + kind}
    }
    if len(own) < count:
        return
    print(f"\n{count} {NAMES[kind]} (mean of the experts, each on its skill: {statistics.mean(own.values()):.1f})\n")
    print("| model | " + " | ".join(skills) + " | mean | normalised | loss | best scale | seeds |")
    print("|---" * (count + 6) + "|")
    print("| the experts | " + " | ".join(f"{own[skill]:.1f}" for skill in skills) + " | | | | | |")
    for name, seeds, best in rows(lines, kind, count):
        if not seeds:
            continue
        each = [spread([line["exact_match"][skill] for line in seeds], 1) for skill in skills]
        normal = [statistics.mean(line["exact_match"][skill] / own[skill] for skill in skills) for line in seeds]
        means = spread([mean_of(line, skills) for line in seeds], 1)
        losses = spread([mean_of(line, skills, "loss") for line in seeds], 3)
        oracle = f"{mean_of(best, skills):.1f} ({best['key']['scale']})" if best else ""
        print(f"| {name} | " + " | ".join([*each, means, spread(normal, 3), losses, oracle, str(len(seeds))]) + " |")


if __name__ == "__main__":
    every = read_all("bench_b")
    for adapters in ADAPTERS:
        for number in COUNTS:
            print_table(every, adapters, number)
