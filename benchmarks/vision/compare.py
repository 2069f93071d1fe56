"""Merge the experts by every method through the command line, and score the merges on held-out pictures.

`python benchmarks/vision/compare.py [--adapters] [ROW ...]` merges by every setting of SPACE, chooses each row's on the
validation split, and scores that one on the test split. Every trial is a line of `results/`, and is not repeated. Rows
with samples are run with several draws of them from the calibration pool.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import pictures
import torch
import yaml
from model import Row, inputs
from peft import PeftModel
from pictures import SKILLS
from table import print_table, read, write
from train import ADAPTER, MIXTURE, WORKDIR
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 8


def scaled(option: str, values: tuple[float, ...], *fixed: str) -> list[list[str]]:
    """Return the settings with each value of an option, beside fixed ones."""
    return [[*fixed, f"parameters.{option}={value}"] for value in values]


FEATCAL = "calibrate=[featcal]"
EIGHT = f"parameters.samples_per_model={SAMPLES}"
WEIGHTS = (0.3, 0.5, 0.7, 1.0)
SCALES = (0.5, 0.7, 1.0, 1.3)
# By the name of a row: settings, as overrides of the config. Rows of SAMPLED read calibration samples.
SPACE: dict[str, list[list[str]]] = {
    "weight_average": [["merge_method=weight_average"]],
    "task_arithmetic": scaled("weight", WEIGHTS, "merge_method=task_arithmetic"),
    "ties": scaled(
        "lambda", (0.7, 1.0, 1.5, 2.0), "merge_method=ties", "parameters.weight=1", "parameters.density=0.2"
    ),
    "svd": scaled("lambda", SCALES, "merge_method=svd"),
    "wudi2": scaled("lambda", SCALES, "merge_method=wudi2"),
    "swudi": scaled("lambda", SCALES, "merge_method=swudi"),
}
SAMPLED: dict[str, list[list[str]]] = {
    "regmean": scaled("alpha", (0.5, 0.9, 1.0), "merge_method=regmean", EIGHT),
    "expert_merging": [["merge_method=expert_merging"]],
    "expert_merging_pp": [["merge_method=expert_merging_pp"]],
    "task_arithmetic, featcal": scaled("weight", WEIGHTS, "merge_method=task_arithmetic", EIGHT, FEATCAL),
    "expert_merging, featcal": [["merge_method=expert_merging", FEATCAL]],
    "expert_merging_pp, featcal": [["merge_method=expert_merging_pp", FEATCAL]],
}


@torch.inference_mode()
def score(model: Any, skill: str, split: str) -> list[float]:
    """Return exact match in per cent of a split's questions, and the loss of the answers in nats per token.

    Greedy decoding produces exactly the answer if and only if, given the answer as input, the most likely token is
    right at every position of it, its end included.
    """
    rows: list[Row] = [(one.image, one.question, one.answer) for one in pictures.split(skill, split)]
    batch = inputs(rows)
    labels_BT = batch.pop("labels")[:, 1:]
    log_probs_BTV = model(**batch).logits[:, :-1].float().log_softmax(-1)
    counted_BT = labels_BT != -100
    found_BT = log_probs_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    right_B = ((log_probs_BTV.argmax(-1) == labels_BT) | ~counted_BT).all(1)
    return [100 * right_B.double().mean().item(), -found_BT[counted_BT].mean().item()]


def scores_of(folder: Path, split: str) -> dict[str, list[float]]:
    """Return the scores of the model in a folder, for each skill."""
    adapter = (folder / "adapter_config.json").exists()
    model: Any = AutoModelForImageTextToText.from_pretrained(folder.parent / "base" if adapter else folder)
    model = (PeftModel.from_pretrained(model, folder) if adapter else model).float().eval()
    return {skill: score(model, skill, split) for skill in SKILLS}


def calibration(skill: str, draw: int, workdir: Path) -> Path:
    """Write prompts with pictures, drawn from the skill's pool, without answers; return the file."""
    folder = workdir / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    pool, lines = pictures.split(skill, "calibration"), []
    for number in random.Random(f"{skill}-{draw}").sample(range(len(pool)), SAMPLES):
        image = folder / f"{skill}-{number}.png"
        pool[number].image.save(image)
        lines.append(json.dumps({"image_path": image.name, "question": pool[number].question}) + "\n")
    path = folder / f"{skill}-{draw}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def config(draw: int, kind: str, workdir: Path) -> Path:
    """Write the config of a merge of the four experts; return the file."""
    models = [
        {"model": str(workdir / "models" / f"{skill}{kind}"), "calibration": str(calibration(skill, draw, workdir))}
        for skill in SKILLS
    ]
    raw = {"merge_method": "expert_merging", "base_model": str(workdir / "models" / "base"), "models": models}
    path = workdir / f"merge{kind}-{draw}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def merge(setting: list[str], path: Path, out: Path) -> dict[str, float]:
    """Merge by a setting into a folder; return seconds of the command and peak memory of its largest process."""
    with tempfile.TemporaryDirectory() as cache:
        given = [part for override in (*setting, f"cache={cache}") for part in ("--set", override)]
        began = time.monotonic()
        command = [sys.executable, ROOT / "cli.py", "merge", path, "--out", out, *given]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
    memory = json.loads((out / "merge" / "memory.json").read_text(encoding="utf-8"))
    return {"seconds": round(seconds, 1), "peak": max(actor["peak_anonymous_bytes"] for actor in memory["actors"])}


def measure(name: str, draw: int, kind: str, workdir: Path) -> None:
    """Merge by all settings of a row, choose one on the validation split, and log its scores on the test split."""
    settings, tried = (SPACE | SAMPLED)[name], []
    with tempfile.TemporaryDirectory(dir=workdir) as scratch:
        for number, setting in enumerate(settings):
            out = Path(scratch, str(number))
            took = merge(setting, config(draw, kind, workdir), out)
            line = {"row": name, "kind": kind, "draw": draw, "setting": setting, **took}
            tried.append(line | {"validation": scores_of(out, "validation")})
            write("validation", tried[-1])
        chosen = max(range(len(tried)), key=lambda number: mean_score(tried[number]["validation"]))
        used = {
            "samples": SAMPLES if name in SAMPLED else 0,
            "labels": pictures.SIZES["validation"] * len(SKILLS) if len(settings) > 1 else 0,
        }
        write("test", tried[chosen] | used | {"test": scores_of(Path(scratch, str(chosen)), "test")})


def mean_score(scores: dict[str, list[float]]) -> tuple[float, float]:
    """Return what the choice of a setting maximises: mean exact match, then the negative mean loss."""
    return sum(one[0] for one in scores.values()), -sum(one[1] for one in scores.values())


@click.command(help=__doc__)
@click.argument("rows", nargs=-1)
@click.option("--adapters", is_flag=True, help="Merge the LoRA experts instead of the full ones.")
@click.option("--draws", default=3, help="Draws of the calibration samples.")
@click.option("--workdir", type=click.Path(path_type=Path), default=WORKDIR)
def main(rows: tuple[str, ...], adapters: bool, draws: int, workdir: Path) -> None:
    logging.disable_progress_bar()
    kind = ADAPTER if adapters else ""
    singles = {"base": "any", MIXTURE: "any"} | dict.fromkeys(SKILLS, kind)
    done = {(line["row"], line["kind"], line["draw"]) for line in read("test")}
    for name, of in singles.items():
        if (name, of, 0) not in done:
            folder = workdir / "models" / f"{name}{kind if name in SKILLS else ''}"
            scores = {split: scores_of(folder, split) for split in ("validation", "test")}
            write("test", {"row": name, "kind": of, "draw": 0, **scores})
    for name in rows or (*SPACE, *SAMPLED):
        for draw in range(draws if name in SAMPLED else 1):
            if (name, kind, draw) not in done:
                measure(name, draw, kind, workdir)
    print_table(kind)


if __name__ == "__main__":
    main()
