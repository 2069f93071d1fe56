"""Run the quickstart end to end: fetch the base, merge with Expert Merging++, and compare models on held-out examples.

`make demo`, or `python demo.py [OUT]`. Each row of the table is one model. Base, experts, Task Arithmetic and Expert
Merging are set from coefficients (0, 1 for one expert, a weight, the result of stage 1); the other merges are loaded
from their folders, as a user would load them.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table
from skills import SKILLS

from cluster.progress import Progress, busy

if TYPE_CHECKING:
    from scoring import Score

HERE = Path(__file__).resolve().parent
ROOT, CONFIG = HERE.parent.parent, HERE / "merge.yaml"
# Held-out examples of each skill.
EXAMPLES = 50
# The settings of the baselines that choose_baselines.py chose on validation examples.
BASELINES = {
    "task arithmetic": ["merge_method=task_arithmetic", "parameters.weight=0.6"],
    "ties": ["merge_method=ties", "parameters.weight=1", "parameters.density=0.2", "parameters.lambda=1.5"],
    "svd": ["merge_method=svd", "parameters.lambda=0.6"],
}
# As for the processes of a merge, see cluster/session.py; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
CONSOLE = rich.console.Console(highlight=False, soft_wrap=True)


def main(out: Path) -> None:
    """Merge into `out`, score all models, and print the figures and what to do next."""
    began = time.monotonic()
    CONSOLE.print("Three experts of SmolLM2-135M-Instruct have learned one skill each. They become one model.")
    subprocess.run([sys.executable, HERE / "fetch_base.py"], check=True)
    CONSOLE.print(f"\n$ {command('cli.py', 'merge', CONFIG, '--out', out)}", markup=False)
    before = time.monotonic()
    subprocess.run([sys.executable, ROOT / "cli.py", "merge", CONFIG, "--out", out], check=True)
    merged = time.monotonic() - before
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".demo-") as scratch:
        folders = {name: Path(scratch, name) for name in BASELINES}
        for name, folder in folders.items():
            CONSOLE.print(f"\nfor comparison: {', '.join(BASELINES[name])}", markup=False)
            merge_baseline(name, folder)
        CONSOLE.print(f"\nscoring on {EXAMPLES} held-out examples of each skill")
        rows = score_all(out, folders, Path(scratch))
    show(rows)
    finish(out, merged, time.monotonic() - began)


def merge_baseline(name: str, folder: Path) -> None:
    """Merge by the method of a baseline into a folder."""
    with busy("loading"):
        from cluster.driver import merge
        from engine.config.reader import load_config
        from engine.planning.planner import make_plan

        plan = make_plan(load_config(CONFIG, BASELINES[name]), HERE)
    merge(plan, str(folder))


def score_all(out: Path, baselines: dict[str, Path], scratch: Path) -> dict[str, dict[str, Score]]:
    """Return the scores of every model of the table, by its name and the skill."""
    with busy("loading"):
        from scoring import score
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(out)
    rows: dict[str, dict[str, Score]] = {}
    with Progress() as progress:
        progress.phase("scoring", (1 + len(SKILLS) + len(baselines) + 2) * len(SKILLS))
        done = 0
        for name, model in models(out, baselines, scratch):
            for skill in SKILLS:
                rows.setdefault(name, {})[skill] = score(model, tokenizer, skill, examples=EXAMPLES)
                done += 1
                progress.advance("scoring", done, name)
    return rows


def models(out: Path, baselines: dict[str, Path], scratch: Path) -> Iterator[tuple[str, Any]]:
    """Yield every model of the table and its name, one at a time."""
    from merged_models import MergedModels
    from transformers import AutoModelForCausalLM

    from engine.config.reader import load_config
    from engine.planning.planner import make_plan
    from engine.task_vectors.coefficients import read_coefficients

    whole = MergedModels(make_plan(load_config(CONFIG, ["parameters.task_vectors=whole"]), HERE))
    yield "base", whole.set(whole.constant([0.0] * len(SKILLS)))
    for index, expert in enumerate(whole.plan.experts):
        yield f"expert {expert.name}", whole.set(whole.expert(index))
    del whole
    for name, folder in baselines.items():
        yield name, AutoModelForCausalLM.from_pretrained(folder).eval()
    orthogonal = MergedModels(make_plan(load_config(CONFIG), HERE), scratch / "task_vectors")
    _, first = read_coefficients(out / "merge" / "coefficients.parquet", stage=1)
    yield "expert merging", orthogonal.set(first)
    del orthogonal
    yield "expert merging++", AutoModelForCausalLM.from_pretrained(out).eval()


def show(rows: dict[str, dict[str, Score]]) -> None:
    """Print scores as a table of models and skills."""
    table = rich.table.Table(title="exact match in %, loss in nats a token")
    table.add_column("model")
    for skill in [*SKILLS, "mean"]:
        table.add_column(skill, justify="right")
    for name, scores in rows.items():
        matches = [scores[skill].exact_match for skill in SKILLS]
        losses = [scores[skill].loss for skill in SKILLS]
        cells = zip([*matches, sum(matches) / len(matches)], [*losses, sum(losses) / len(losses)], strict=True)
        table.add_row(name, *(f"{match:5.1f}  {loss:5.3f}" for match, loss in cells))
    CONSOLE.print(table)


def finish(out: Path, merged: float, whole: float) -> None:
    """Print what the merge took, where its files are, and what to do with them."""
    actors = json.loads((out / "merge" / "memory.json").read_text())["actors"]
    memory = [f"{actor['role']} {actor['peak_anonymous_bytes'] / 1e9:.2f} GB" for actor in actors]
    model = shown(out)
    lines = {
        "time": f"{merged:.0f} s for the merge, {whole:.0f} s in all, on {os.cpu_count()} cores",
        "memory": f"{', '.join(memory)} (at their peaks)",
        "model": f"{model}/",
        "report": f"{model}/merge/report.html",
        "load it": f'AutoModelForCausalLM.from_pretrained("{model}")',
        "chat with it": command("cli.py", "chat", out),
        "evaluate it": command("cli.py", "evaluate", out, "--data", HERE / "data" / "sorting" / "test.jsonl"),
        "your experts": f"{command('cli.py', 'init')} writes a config for them",
        "read next": f"{shown(ROOT / 'docs' / 'README.md')}, {shown(HERE / 'README.md')}",
    }
    CONSOLE.print()
    for name, line in lines.items():
        CONSOLE.print(f"{name:<14}{line}", markup=False)


def command(script: str, *arguments: Any) -> str:
    """Return a command as a user would type it in this folder."""
    # Not resolved: the Python of an environment is a link.
    return shlex.join([os.path.relpath(sys.executable), shown(ROOT / script), *map(shown, arguments)])


def shown(part: Any) -> str:
    """Return a path relative to this folder if it is below it; everything else as it is."""
    return os.path.relpath(part) if isinstance(part, Path) and part.is_relative_to(Path.cwd()) else str(part)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "merged").absolute())
