"""Plans of the recipes for the published experts, from their real headers in sparse files without weights."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import rich.filesize
import yaml
from PIL import Image
from thorough import thorough_but

from engine.config.reader import load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES, HEADERS = ROOT / "examples" / "recipes", ROOT / "tests" / "golden" / "headers"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# By recipe: the prefix of the merged blocks (written out, not derived from the exclude patterns), the number of blocks,
# the merged tensors of the projector, and the experts with their samples.
TASKS = {"OCR": 10, "VQA": 10, "Geometry": 10, "Chart": 5, "Grounding": 5}
EXPECTED = {
    "mistral-7b": ("model.layers", 32, [], {"Chat": 5, "Math": 5, "Code": 5}),
    "qwen2-vl-7b": ("model.layers", 28, [], TASKS),
    # mlp1.0 is a norm whose name no exclude pattern matches.
    "internvl2_5-1b": ("language_model.model.layers", 24, ["mlp1.0", "mlp1.1", "mlp1.3"], TASKS),
}
# The machines of the figures in the recipes: one line for each.
MACHINES = {
    "1 GPU": "--cpus 16 --gpus 1 --memory 256 --gpu-memory 80",
    "8 GPUs": "--cpus 96 --gpus 8 --memory 2000 --gpu-memory 80",
}
# The recipe with this engine's defaults, and that with the paper's numbers.
KINDS = ("", "-paper")
# The options of the published model_merging.py.
PUBLISHED_OPTIONS = """
    method cache_dir output_path run_name scaling_coefficient exclude_params run_tests data_dir samples_per_task
    samples_per_task_dict num_epochs temperature learning_rate mixed_precision gradient_accumulation_steps seed
    base_model_path sparsity_reg_weight hidden_states_layers hidden_states_weight loss_alphas task_vector_coeffs_dict
    coeffs_size_dict
""".split()


def record_of(name: str) -> dict[str, Any]:
    return json.loads((HEADERS / f"{name}.json").read_text(encoding="utf-8"))


def tensors_of(record: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and shape of each tensor; all are bfloat16."""
    for pattern, blocks, shape, dtype in record["tensors"]:
        assert dtype == "BF16"
        yield from ((pattern.format(block), shape) for block in range(blocks or 1))


def write_sparse(path: Path, tensors: list[tuple[str, list[int]]]) -> None:
    """Write a sparse safetensors file, whose weights take no disk space."""
    header, end = {}, 0
    for name, shape in tensors:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def put_in_cache(cache: Path, hub_id: str, record: dict[str, Any]) -> None:
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (folder / "config.json").write_text(json.dumps(record["config"]))
    tensors, count = list(tensors_of(record)), record["files"]
    if count == 1:
        write_sparse(folder / "model.safetensors", tensors)
        return
    weight_map, size = {}, math.ceil(len(tensors) / count)
    for number in range(count):
        part = tensors[number * size : (number + 1) * size]
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        write_sparse(folder / file, part)
        weight_map |= {name: file for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_data(folder: Path, recipe: dict[str, Any]) -> None:
    """Write ten published records to each file that the recipe names, more than a recipe uses."""
    sees = "calibration" in recipe and "image_options" in recipe["calibration"]
    # About 500 tokens, where the samples have no images.
    more = "" if sees else " Say why." * 220
    (folder / "data" / "images").mkdir(parents=True)
    for size in (30, 900):
        Image.new("RGB", (size, 2 * size), "teal").save(folder / "data" / "images" / f"{size}.png")
    for model in recipe["models"]:
        files = model["calibration"] if isinstance(model["calibration"], list) else [model["calibration"]]
        for file in files:
            path = folder / (file["path"] if isinstance(file, dict) else file)
            records = [{"question": f"What is this, {number}?{more}", "question_id": number} for number in range(10)]
            records = [one | {"task_name": path.stem, "response": "Teal."} for one in records]
            if sees:
                # Beside the data file, and from the config's folder.
                places = ["images/30.png", "data/images/900.png"]
                records = [one | {"image_path": places[number % 2]} for number, one in enumerate(records)]
            path.write_text(json.dumps(records))


def expected_line(machine: str, printed: str) -> str:
    """Return the line that a recipe has of what `plan` printed for a machine."""
    rows = {row[0].strip(): row[1] for line in printed.splitlines() if len(row := line.strip().split("  ", 1)) == 2}
    numbers = {name: float(rows[name].split()[0]) for name in ("trainer memory", "expert memory", "whole run")}
    disk = rows["disk"].strip().partition(";")[0]
    return (
        f"#   {machine}: {math.ceil(numbers['whole run'] / 60)} min; trainer {numbers['trainer memory']:.0f} GB, "
        f"expert {numbers['expert memory']:.0f} GB; disk {disk}\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "machine"),
    thorough_but([("mistral-7b", "-paper", "1 GPU")], product(EXPECTED, KINDS, MACHINES)),
)
def test_a_recipe_is_planned_from_published_headers(name: str, kind: str, machine: str, tmp_path: Path) -> None:
    record, file = record_of(name), RECIPES / f"{name}{kind}.yaml"
    recipe, text = load_config(file), file.read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    for hub_id in (recipe.base_model, *(model.model for model in recipe.models)):
        put_in_cache(tmp_path / "hub", hub_id, record)
    write_data(tmp_path, raw)
    shutil.copy(file, tmp_path)
    # The tables of the plan are parsed line by line, so they must not wrap.
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "COLUMNS": "220"}
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", "plan", tmp_path / file.name, *MACHINES[machine].split()],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    line = expected_line(machine, done.stdout)
    assert line in text, f"in {file}, write: {line}"

    where, blocks, projector, experts = EXPECTED[name]
    shapes = dict(tensors_of(record))
    merged = [f"{where}.{block}.{part}.weight" for block in range(blocks) for part in BLOCK]
    merged += [f"{part}.weight" for part in projector]
    elements = sum(math.prod(shapes[tensor]) for tensor in merged)
    lines = [printed.split() for printed in done.stdout.splitlines()]
    cells = [" ".join(words) for words in lines]
    assert any(cell.startswith(f"tensors {len(merged)} merged of {len(shapes)}") for cell in cells)
    everything = sum(math.prod(shape) for shape in shapes.values())
    # The exact number of elements shows that no tensor of the vision tower is merged.
    assert f"elements {elements:,} merged of {everything:,}" in cells
    merged_bytes = f"merged bytes {rich.filesize.decimal(2 * elements)}"
    assert any(cell.startswith(merged_bytes) and "bfloat16" in cell for cell in cells)
    assert any(cell.startswith(f"coefficients {len(merged)} ") for cell in cells)
    budget = int(recipe.parameters.budget * len(merged))
    assert any(f" {budget} " in cell and "stage 2" in cell for cell in cells)
    assert f"hidden layers {blocks // 2}" in cells
    if not kind:
        experts = dict.fromkeys(experts, recipe.parameters.samples_per_model)
    assert any(cell.startswith(f"expert forwards {sum(experts.values())}") for cell in cells)
    prior = str(recipe.parameters.weight)
    rows = [words for words in lines if words and words[0] in experts]
    assert [(row[0], row[1], row[2], row[4]) for row in rows] == [
        (expert, "checkpoint", prior, str(samples)) for expert, samples in experts.items()
    ]
    assert [row[-1] for row in rows] == [f"{model['model']}@{COMMIT}" for model in raw["models"]]


def test_the_recorded_headers_are_what_their_generator_writes() -> None:
    generator = runpy.run_path(str(HEADERS / "record.py"))
    records = generator["make"]()
    assert set(records) == set(EXPECTED)
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {f"{name}{kind}" for name in EXPECTED for kind in KINDS}
    for name, record in records.items():
        text = (HEADERS / f"{name}.json").read_text(encoding="utf-8")
        assert text == generator["as_text"](record), "python tests/golden/headers/record.py"


def test_the_recorded_headers_match_the_published_totals() -> None:
    sizes = {name: [math.prod(shape) for _, shape in tensors_of(record_of(name))] for name in EXPECTED}
    assert {name: len(tensors) for name, tensors in sizes.items()} == {
        "mistral-7b": 291,
        "qwen2-vl-7b": 730,
        "internvl2_5-1b": 637,
    }
    assert 2 * sum(sizes["mistral-7b"]) == 14_483_464_192
    assert 2 * sum(sizes["qwen2-vl-7b"]) == 16_582_751_232
    assert round(sum(sizes["internvl2_5-1b"]) / 1e6) == 938


def test_every_published_option_is_on_the_page() -> None:
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    assert len(PUBLISHED_OPTIONS) == 23
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert [option for option in PUBLISHED_OPTIONS if not any(f"`--{option}`" in row for row in rows)] == []
