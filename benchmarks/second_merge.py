"""Measure how long a merge takes after another one, whose results it shares through the cache (docs/reuse.md).

All merges run one after the other through the command line: first one with an empty cache, then others with one option
changed each. Times are of whole commands, as ratios to the first one. The steps of a stage are taken again where an
option of the stage changed, so what is left of the time depends on the option. With --more, the models are merged
without the last one, which is then added with --extend; its time is a ratio to that of the whole merge, with an empty
cache of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import yaml
from merges import ENVIRONMENT, ROOT
from report import Report, Target, json_option, print_table

FIRST, MORE = "first", "one expert more"
# What is changed, and the options.
CHANGES = {
    "nothing": (),
    "the output's dtype": ("out_dtype=bfloat16",),
    "budget of stage 2": ("parameters.budget=4",),
    "more epochs": ("parameters.epochs=10",),
    "a loss weight": ("models.0.parameters.loss_weight=2",),
}
# The second merge of a sweep is this much faster.
WANTED = 4


def merged(config: Path, out: Path, cache: Path, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a merge into `out`, which is removed, and its merge/memory.json."""
    command = [sys.executable, str(ROOT / "cli.py"), "merge", str(config), "--out", str(out), *arguments]
    began = time.monotonic()
    subprocess.run([*command, "--set", f"cache={cache}"], env=ENVIRONMENT, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - began
    memory: dict[str, Any] = json.loads((out / "merge" / "memory.json").read_text(encoding="utf-8"))
    return seconds, memory


def extended(config: Path, workdir: Path) -> tuple[float, dict[str, Any]]:
    """Return what `merged` does of a merge to which the config's last model is added."""
    raw = yaml.safe_load(config.read_text(encoding="utf-8"))
    *models, last = raw["models"]
    few, new, cache = config.with_name("few.yaml"), config.with_name("new.yaml"), workdir / "cache of fewer"
    few.write_text(yaml.safe_dump(raw | {"models": models}), encoding="utf-8")
    new.write_text(yaml.safe_dump({"models": [last]}), encoding="utf-8")
    merged(few, workdir / "few", cache)
    return merged(new, workdir / "more", cache, "--extend", str(workdir / "few"))


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("--workdir", type=click.Path(path_type=Path), required=True, help="New folder for outputs and cache.")
@click.option("--only", multiple=True, type=click.Choice([*CHANGES]), help="Of the changes, measure these; repeatable.")
@click.option("--more", is_flag=True, help="Also add the last model to a merge of the others.")
@json_option()
def main(config: Path, workdir: Path, only: tuple[str, ...], more: bool, path: Path | None) -> None:
    """Merge CONFIG several times."""
    workdir = workdir.absolute()
    workdir.mkdir(parents=True)
    # Beside the config's own relative paths.
    shutil.copy(config, workdir / "merge.yaml")
    config, cache, path = workdir / "merge.yaml", workdir / "cache", path or workdir / "second_merge.json"
    report = Report({"config": str(config), "only": list(only), "more": more, "cpus": os.cpu_count()})
    whole, memory = merged(config, workdir / FIRST, cache)
    report.other["seconds, first"] = whole
    rows = {FIRST: [f"{whole:.0f}", "1.00", str(memory["expert_forwards"]), ""]}

    def add(name: str, seconds: float, memory: dict[str, Any]) -> None:
        report.time_ratios[f"{name} / first"] = seconds / whole
        report.other[f"seconds, {name}"] = seconds
        reused = ", ".join(f"{count} {what}" for what, count in memory["reused"].items())
        rows[name] = [f"{seconds:.0f}", f"{seconds / whole:.2f}", str(memory["expert_forwards"]), reused]
        report.save(path)

    for name, options in CHANGES.items():
        if not only or name in only:
            given = [argument for option in options for argument in ("--set", option)]
            add(name, *merged(config, workdir / name.replace(" ", "-"), cache, *given))
    if more:
        add(MORE, *extended(config, workdir))
    for name in CHANGES:
        if (ratio := report.time_ratios.get(f"{name} / first")) is not None:
            report.targets.append(Target(f"{name}: part of the first merge's time", ratio, 1 / WANTED))
    print_table("merges", ["seconds", "of the first", "forward passes", "reused"], rows)
    report.finish(path)


if __name__ == "__main__":
    main()
