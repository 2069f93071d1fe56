"""Run the quickstart end to end: fetch the base, merge with Expert Merging++, and compare models on held-out examples.

`make demo`, or `python demo.py [OUT]`. The merge runs through the command line. Each row of the table is one model.
Base, experts, Task Arithmetic and Expert Merging are set from coefficients (0, 1 for one expert, the prior, the result
of stage 1); Expert Merging++ is loaded from the output folder, as a user would load it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import rich.console
import rich.table
import torch
from fetch_base import fetch
from merged_models import MergedModels
from scoring import Score, score
from skills import SKILLS
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from engine.config.reader import load_config
from engine.planning.planner import make_plan
from engine.task_vectors.coefficients import read_coefficients

HERE = Path(__file__).resolve().parent
CLI = HERE.parent.parent / "cli.py"


def main(out: Path) -> None:
    """Merge into `out`, score all models and print the figures."""
    logging.disable_progress_bar()
    began = time.monotonic()
    fetch()
    config = HERE / "merge.yaml"
    subprocess.run([sys.executable, str(CLI), "merge", str(config), "--out", str(out)], check=True)
    merged = time.monotonic()

    plan = make_plan(load_config(config), config.parent)
    models = MergedModels(plan)
    _, first = read_coefficients(out / "merge" / "coefficients.parquet", stage=1)
    variants = {"base": models.constant([0.0] * len(plan.experts))}
    variants |= {f"expert {expert.name}": models.expert(k) for k, expert in enumerate(plan.experts)}
    variants |= {
        "task arithmetic": models.constant([expert.weight for expert in plan.experts]),
        "expert merging": first,
    }
    rows: dict[str, dict[str, Score]] = {}
    for name, coefficients in variants.items():
        print(f"scoring {name}", flush=True)
        model = models.set(coefficients)
        rows[name] = {skill: score(model, models.tokenizer, skill) for skill in SKILLS}
    print("scoring expert merging++", flush=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, plan.dtype)).eval()
    rows["expert merging++"] = {skill: score(model, models.tokenizer, skill) for skill in SKILLS}

    show(rows)
    figures = json.loads((out / "merge" / "memory.json").read_text())
    for actor in figures["actors"]:
        print(f"{actor['role']:<16} {actor['peak_anonymous_bytes'] / 1e6:7.0f} MB peak anonymous memory")
    print(f"expert forwards {figures['expert_forwards']}, targets {figures['bytes_targets'] / 1e6:.1f} MB")
    print(
        f"fetch and merge {merged - began:.0f} s, scoring {time.monotonic() - merged:.0f} s "
        f"({os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__})"
    )


def show(rows: dict[str, dict[str, Score]]) -> None:
    """Print scores as a table of models and skills."""
    table = rich.table.Table(title="Held-out examples: exact match in %, loss in nats a token")
    table.add_column("model")
    for skill in [*SKILLS, "mean"]:
        table.add_column(skill, justify="right")
    for name, scores in rows.items():
        matches = [scores[skill].exact_match for skill in SKILLS]
        losses = [scores[skill].loss for skill in SKILLS]
        cells = zip([*matches, sum(matches) / len(matches)], [*losses, sum(losses) / len(losses)], strict=True)
        table.add_row(name, *(f"{match:5.1f}  {loss:5.3f}" for match, loss in cells))
    rich.console.Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "merged").absolute())
