"""Print which models fit which GPUs, by the scaling model: a table for docs/gpu.md.

Each cell has the least that must be set for a merge of K experts with the default options, and its seconds per step.
Models have headers and no data (`large_models.py`), so this runs on any machine; nothing is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import click
import large_models
from report import print_table

from engine.config.reader import load_config
from engine.planning.costs.fitting import shortages
from engine.planning.costs.rates import GB
from engine.planning.costs.scaling import Machines, choose
from engine.planning.costs.trainers import settled
from engine.planning.plan import Plan
from engine.planning.planner import make_plan

# Number of GPUs of the trainer, and the GB of one.
GPUS = ((1, 24), (1, 48), (1, 80), (1, 141), (2, 80), (4, 80), (8, 80), (8, 141))
# From the cheapest setting to the slowest.
SETTINGS = (
    ("", {}),
    ("stream", {"gradients": "stream"}),
    ("checkpoint", {"gradient_checkpointing": True}),
    ("checkpoint, stream", {"gradients": "stream", "gradient_checkpointing": True}),
)


def cell(plan: Plan, tokens: Sequence[Sequence[int]], gpus: int, memory: int) -> str:
    """Return the first settings with which a merge fits GPUs of `memory` GB, with its seconds per step."""
    node, cluster = Machines(1, 96, gpus, 2000 * GB, memory * GB), plan.config.cluster
    seats = {
        role: getattr(cluster, role).model_copy(update={"num_gpus": float(gpus)}) for role in ("trainer", "expert")
    }
    for name, given in SETTINGS:
        changed = {"cluster": cluster.model_copy(update=seats), **given}
        tried, work, _ = settled(replace(plan, config=plan.config.model_copy(update=changed)), tokens, node)
        found = choose(tried, work, node)
        if not shortages(tried, work, found, node):
            return f"{name or 'default'}: {found.step.total:.1f} s"
    return "no"


@click.command()
@click.option("--experts", default=8, show_default=True)
def main(experts: int) -> None:
    """Print the table for full experts and for LoRA adapters."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for (size, shape), adapters in product(large_models.SHAPES.items(), (False, True)):
            kind = "LoRA" if adapters else "full"
            path = large_models.write_merge(Path(folder) / f"{size}-{kind}", shape, experts, adapters)
            plan = make_plan(load_config(path), path.parent)
            tokens = [[large_models.TOKENS] * large_models.SAMPLES] * experts
            rows[f"{size}, {kind}"] = [cell(plan, tokens, gpus, memory) for gpus, memory in GPUS]
    print_table(f"{experts} experts, bfloat16", [f"{gpus} x {memory} GB" for gpus, memory in GPUS], rows)


if __name__ == "__main__":
    main()
