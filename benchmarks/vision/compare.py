"""Merge the experts by every method, and score the merges on held-out pictures.

`python benchmarks/vision/compare.py [--adapters] [ROW ...]` merges by every setting of SPACE, multiplies its task
vector by each of the row's factors, chooses both on the validation split, and scores the chosen merge on the test
split. Existing rows of `results/test.jsonl` are not repeated. Rows with samples can be run with several draws of them.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import pictures
import ray
import torch
import yaml
from model import Row, inputs
from peft import PeftModel
from pictures import SKILLS
from table import print_table, read, write
from train import ADAPTER, MIXTURE, WORKDIR
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from cluster import merge

SAMPLES = 8
ON_SAMPLES = {"parameters.samples_per_model": SAMPLES}
FEATCAL = {"calibrate": ["featcal"]}
ORTHOGONAL = {"parameters.task_vectors": "orthogonal"}
SUMS, MEANS, WHOLE = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0), (0.7, 1.0, 1.3, 1.6, 2.0), (0.3, 0.5, 0.7, 1.0, 1.3, 1.6)
Setting = dict[str, Any]
# By the name of a row: method, settings as overrides of the config, and factors of the merged task vector.
SPACE: dict[str, tuple[str, list[Setting], tuple[float, ...]]] = {
    "weight_average": ("weight_average", [{}], (1.0,)),
    "task_arithmetic": ("task_arithmetic", [{"parameters.weight": 1.0}], SUMS),
    "ties": ("ties", [{"parameters.weight": 1.0, "parameters.density": density} for density in (0.2, 0.5)], MEANS),
    "svd": ("svd", [{}], WHOLE),
    "swudi": ("swudi", [{}], WHOLE),
    "swudi_a": ("swudi_a", [{}], WHOLE),
    "wudi2": ("wudi2", [{}], WHOLE),
    "regmean": ("regmean", [ON_SAMPLES | {"parameters.alpha": alpha} for alpha in (0.1, 0.9)], (1.0,)),
    "expert_merging": ("expert_merging", [{}], (1.0,)),
    "expert_merging_pp": ("expert_merging_pp", [{}], (1.0,)),
    "expert_merging, task_vectors: orthogonal": ("expert_merging", [ORTHOGONAL], (1.0,)),
    "expert_merging_pp, task_vectors: orthogonal": ("expert_merging_pp", [ORTHOGONAL], (1.0,)),
    "task_arithmetic, featcal": (
        "task_arithmetic",
        [ON_SAMPLES | FEATCAL | {"parameters.weight": weight} for weight in (0.4, 0.7)],
        (1.0,),
    ),
    "expert_merging, featcal": ("expert_merging", [FEATCAL], (1.0,)),
    "expert_merging_pp, featcal": ("expert_merging_pp", [FEATCAL], (1.0,)),
}
SAMPLED = tuple(row for row in SPACE if "regmean" in row or "expert" in row or "featcal" in row)


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


def scores(model: Any, split: str) -> dict[str, list[float]]:
    """Return the scores of a model on a split, for each skill."""
    return {skill: score(model, skill, split) for skill in SKILLS}


def loaded(folder: Path) -> Any:
    """Return the model of a folder, or that of an adapter of the base next to it."""
    adapter = (folder / "adapter_config.json").exists()
    model: Any = AutoModelForImageTextToText.from_pretrained(folder.parent / "base" if adapter else folder)
    return (PeftModel.from_pretrained(model, folder) if adapter else model).float().eval()


def factored(base: Any, merged: Any, factor: float) -> Any:
    """Return the base plus the merged task vector times a factor, which is what the option `lambda` does."""
    if factor == 1.0:
        return merged
    model = copy.deepcopy(base)
    with torch.no_grad():
        for ours, its in zip(model.parameters(), merged.parameters(), strict=True):
            ours.add_(its - ours, alpha=factor)
    return model


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


def merged(path: Path, overrides: Setting, out: Path) -> dict[str, float]:
    """Merge into a folder, and return the seconds that it took and the peak memory of the largest process."""
    began = time.monotonic()
    merge(path, out, overrides | {"cache": str(out.with_suffix(".cache")), "cluster.shards": 0})
    seconds = time.monotonic() - began
    memory = json.loads((out / "merge" / "memory.json").read_text(encoding="utf-8"))
    return {"seconds": round(seconds, 1), "peak": max(actor["peak_anonymous_bytes"] for actor in memory["actors"])}


def measure(row: str, draw: int, kind: str, workdir: Path) -> None:
    """Merge by all settings of a row, choose one and a factor on validation, and log its scores on test."""
    method, settings, factors = SPACE[row]
    best: tuple[Any, ...] = ()
    with tempfile.TemporaryDirectory(dir=workdir) as scratch:
        base = loaded(workdir / "models" / "base")
        for number, setting in enumerate(settings):
            out = Path(scratch, str(number))
            took = merged(config(draw, kind, workdir), {"merge_method": method} | setting, out)
            model = loaded(out)
            for factor in factors:
                tried = factored(base, model, factor)
                line = {"row": row, "kind": kind, "draw": draw, "setting": setting, "factor": factor, **took}
                line["validation"] = scores(tried, "validation")
                write("validation", line)
                if not best or mean_score(line["validation"]) > mean_score(best[0]["validation"]):
                    best = line, copy.deepcopy(tried)
    line, model = best
    choices = len(settings) * len(factors)
    used = {"samples": SAMPLES if row in SAMPLED else 0, "choices": choices}
    used["labels"] = pictures.SIZES["validation"] * len(SKILLS) if choices > 1 else 0
    write("test", line | used | {"test": scores(model, "test")})


def mean_score(found: dict[str, list[float]]) -> tuple[float, float]:
    """Return what the choice of a setting maximises: mean exact match, then the negative mean loss."""
    return sum(one[0] for one in found.values()), -sum(one[1] for one in found.values())


@click.command(help=__doc__)
@click.argument("rows", nargs=-1)
@click.option("--adapters", is_flag=True, help="Merge the LoRA experts instead of the full ones.")
@click.option("--draws", default=1, help="Draws of the calibration samples.")
@click.option("--workdir", type=click.Path(path_type=Path), default=WORKDIR)
def main(rows: tuple[str, ...], adapters: bool, draws: int, workdir: Path) -> None:
    logging.disable_progress_bar()
    kind = ADAPTER if adapters else ""
    singles = {"base": "any", MIXTURE: "any"} | dict.fromkeys(SKILLS, kind)
    done = {(line["row"], line["kind"], line["draw"]) for line in read("test")}
    for name, of in singles.items():
        if (name, of, 0) not in done:
            folder = workdir / "models" / f"{name}{kind if name in SKILLS else ''}"
            model = loaded(folder)
            write("test", {"row": name, "kind": of, "draw": 0, "test": scores(model, "test")})
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    for row in rows or SPACE:
        for draw in range(draws if row in SAMPLED else 1):
            if (row, kind, draw) not in done:
                measure(row, draw, kind, workdir)
    print_table(kind)


if __name__ == "__main__":
    main()
