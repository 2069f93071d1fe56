"""Compare merges of the quickstart's experts by many methods: options by the loss on validation, then test scores.

`python compare_methods.py [ROW …]` merges by every setting of SPACE and scores each on the 40 validation and the 100
test examples of each skill. The table has the setting of each row with the smallest loss on validation. A line a
setting goes to stdout as JSON. It takes two hours on two cores and is not needed for the quickstart; the figures are in
benchmarks/quality/README.md.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import CONFIG, ROOT
from scoring import score
from skills import SKILLS
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def scaled(option: str, values: tuple[float, ...], *fixed: str) -> list[list[str]]:
    """Return the settings with each value of an option, beside fixed ones."""
    return [[*fixed, f"parameters.{option}={value}"] for value in values]


def calibrated(method: str, *fixed: str) -> list[list[str]]:
    """Return settings of a merge without and with FeatCal after it."""
    return [[f"merge_method={method}", *fixed, f"calibrate=[{steps}]"] for steps in ("", "featcal")]


ON_SAMPLES = "parameters.samples_per_model=8"
# By the name of a row: settings, as overrides of the quickstart's config.
SPACE: dict[str, list[list[str]]] = {
    "task_arithmetic": scaled("weight", (0.6, 0.8, 1.0), "merge_method=task_arithmetic"),
    "ties": scaled("lambda", (1.0, 1.5, 2.0), "merge_method=ties", "parameters.weight=1", "parameters.density=0.2"),
    "svd": scaled("lambda", (0.6, 0.8, 1.0), "merge_method=svd"),
    "wudi2": scaled("lambda", (0.5, 0.7, 1.0), "merge_method=wudi2"),
    "swudi": scaled("lambda", (0.5, 0.7, 1.0), "merge_method=swudi"),
    "swudi_a": scaled("lambda", (0.5, 0.7, 1.0), "merge_method=swudi_a"),
    "widen": scaled("lambda", (0.5, 1.0, 1.5), "merge_method=widen"),
    "pcb": scaled("lambda", (1.0, 1.5, 2.0), "merge_method=pcb"),
    "doge": scaled("eta", (0.07, 0.3, 1.0), "merge_method=doge"),
    "lot": scaled("lambda", (0.7, 1.0, 1.3), "merge_method=lot", ON_SAMPLES),
    "regmean": scaled("alpha", (0.5, 0.9, 1.0), "merge_method=regmean", ON_SAMPLES),
    "regmean_plus_plus": [["merge_method=regmean_plus_plus", ON_SAMPLES]],
    "closed_form": scaled("lambda", (0.7, 1.0), "merge_method=closed_form", ON_SAMPLES),
    "fisher": [["merge_method=fisher", ON_SAMPLES]],
    "lewis": scaled("lambda", (1.0, 1.5), "merge_method=lewis", "parameters.weight=1", ON_SAMPLES),
    "task_arithmetic, featcal": calibrated("task_arithmetic", "parameters.weight=0.8", ON_SAMPLES)[1:],
    "svd, featcal": calibrated("svd", "parameters.lambda=0.8", ON_SAMPLES)[1:],
    "expert_merging": calibrated("expert_merging")[:1],
    "expert_merging, featcal": calibrated("expert_merging")[1:],
    "expert_merging, closed_form": [["merge_method=expert_merging", "parameters.weight=closed_form"]],
    "expert_merging_pp": calibrated("expert_merging_pp")[:1],
    "expert_merging_pp, featcal": calibrated("expert_merging_pp")[1:],
}


def scores_of(out: Path, split: str) -> dict[str, list[float]]:
    """Return exact match and loss of the model in a folder, for each skill."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    found = {skill: score(model, tokenizer, skill, split) for skill in SKILLS}
    return {skill: [one.exact_match, one.loss] for skill, one in found.items()}


def measure(name: str, setting: list[str], out: Path, cache: Path) -> dict[str, Any]:
    """Merge by a setting into a folder, and return what it took and its scores on the validation examples."""
    given = [part for override in (*setting, f"cache={cache}") for part in ("--set", override)]
    began = time.monotonic()
    command = [sys.executable, ROOT / "cli.py", "merge", CONFIG, "--out", out, *given]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    memory = json.loads((out / "merge" / "memory.json").read_text(encoding="utf-8"))
    peak = max(actor["peak_anonymous_bytes"] for actor in memory["actors"])
    took = {"seconds": round(seconds, 1), "peak": peak}
    return {"name": name, "setting": setting, **took, "validation": scores_of(out, "validation")}


def mean(row: dict[str, Any], split: str, place: int) -> float:
    """Return the mean over the skills of exact match (0) or loss (1)."""
    return sum(row[split][skill][place] for skill in SKILLS) / len(SKILLS)


def main(names: list[str]) -> None:
    """Measure the rows of these names (none: all), and print the table."""
    logging.disable_progress_bar()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}", flush=True)
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or SPACE:
            outs = [Path(scratch, f"{len(table)}-{number}") for number in range(len(SPACE[name]))]
            tried = [measure(name, *pair, Path(scratch, "cache")) for pair in zip(SPACE[name], outs, strict=True)]
            chosen = min(range(len(tried)), key=lambda number: mean(tried[number], "validation", 1))
            tried[chosen]["test"] = scores_of(outs[chosen], "test")
            for row, out in zip(tried, outs, strict=True):
                print(json.dumps(row), flush=True)
                shutil.rmtree(out)
            table.append(tried[chosen])
    print(f"| merge | {' | '.join(SKILLS)} | mean | loss | validation | seconds | peak GB | chosen of |")
    print(f"|{'---|' * (len(SKILLS) + 7)}")
    for row in table:
        each = " | ".join(f"{row['test'][skill][0]:.0f}" for skill in SKILLS)
        figures = f"{mean(row, 'test', 0):.1f} | {mean(row, 'test', 1):.3f} | {mean(row, 'validation', 0):.1f}"
        count = len(SPACE[row["name"]])
        print(f"| {row['name']} | {each} | {figures} | {row['seconds']:.0f} | {row['peak'] / 1e9:.2f} | {count} |")


if __name__ == "__main__":
    main(sys.argv[1:])
