"""Print what merges of 7B models take, by `plan`: the table of docs/choosing.md.

Models have headers and no data (`large_models.py`), so this runs on any machine; nothing is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import large_models

from engine.config.reader import load_config
from engine.planning.costs.disk import disk_needs
from engine.planning.costs.fitting import shortages
from engine.planning.costs.rates import GB
from engine.planning.costs.scaling import Machines, choose
from engine.planning.costs.trainers import settled
from engine.planning.factors import factored
from engine.planning.planner import make_plan
from engine.report.parts import duration

HEAD = (
    "| experts | on a node with | Expert Merging | Expert Merging++ | trainer | each expert | disk |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Case:
    """Experts of a 7B model, and the machine that merges them."""

    experts: int
    adapters: bool
    where: str
    machine: Machines


CASES = (
    Case(3, False, "1 GPU of 80 GB", Machines(1, 16, 1, 256 * GB, 80 * GB)),
    Case(8, False, "1 GPU of 80 GB", Machines(1, 16, 1, 256 * GB, 80 * GB)),
    Case(8, False, "8 GPUs of 80 GB", Machines(1, 96, 8, 2000 * GB, 80 * GB)),
    Case(30, True, "1 GPU of 80 GB", Machines(1, 16, 1, 256 * GB, 80 * GB)),
    Case(3, False, "64 cores, no GPU", Machines(1, 64, 0, 256 * GB, 0)),
)


def table() -> str:
    """Return the table as Markdown."""
    return "\n".join([HEAD, *rows()]) + "\n"


def rows() -> Iterator[str]:
    """Yield the rows of the table."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = large_models.write_merge(Path(folder), large_models.SHAPES["7B"], case.experts, case.adapters)
            times = []
            for method in ("expert_merging", "expert_merging_pp"):
                plan = make_plan(load_config(path, [f"merge_method={method}"]), path.parent)
                tokens = [[large_models.TOKENS] * large_models.SAMPLES] * case.experts
                plan, work, machine = settled(plan, tokens, case.machine)
                found = choose(plan, work, machine)
                assert not shortages(plan, work, found, machine), case
                times.append(duration(found.run_seconds))
            through = factored(plan, machine.gpus > 0, plan.config.cluster.factors)
            needs = disk_needs(plan, tokens, through).total
        kind = "LoRA adapters of rank 16" if case.adapters else "full experts"
        cells = [
            f"{case.experts} {kind}",
            case.where,
            *times,
            _gb(found.memory.trainer),
            _gb(found.memory.expert),
            _gb(needs),
        ]
        yield f"| {' | '.join(cells)} |"


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:.0f} GB"


if __name__ == "__main__":
    print(table(), end="")
