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
from pathlib import Path
from typing import Any

import pytest
import rich.filesize
import yaml
from PIL import Image
from thorough import thorough_but

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
    """Write six published records to each file that the recipe names, one more than the recipe uses."""
    sees = "calibration" in recipe and "image_options" in recipe["calibration"]
    (folder / "data" / "images").mkdir(parents=True)
    for size in (30, 900):
        Image.new("RGB", (size, 2 * size), "teal").save(folder / "data" / "images" / f"{size}.png")
    for model in recipe["models"]:
        files = model["calibration"] if isinstance(model["calibration"], list) else [model["calibration"]]
        for file in files:
            path = folder / (file["path"] if isinstance(file, dict) else file)
            records = [{"question": f"What is this, {number}?", "question_id": number} for number in range(6)]
            records = [one | {"task_name": path.stem, "response": "Teal."} for one in records]
            if sees:
                # Beside the data file, and from the config's folder.
                places = ["images/30.png", "data/images/900.png"]
                records = [one | {"image_path": places[number % 2]} for number, one in enumerate(records)]
            path.write_text(json.dumps(records))


@pytest.mark.parametrize("name", thorough_but(["mistral-7b"], EXPECTED))
def test_a_recipe_is_planned_from_published_headers(name: str, tmp_path: Path) -> None:
    record = record_of(name)
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    for hub_id in (recipe["base_model"], *(model["model"] for model in recipe["models"])):
        put_in_cache(tmp_path / "hub", hub_id, record)
    write_data(tmp_path, recipe)
    shutil.copy(RECIPES / f"{name}.yaml", tmp_path)
    # The tables of the plan are parsed line by line, so they must not wrap.
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "COLUMNS": "220"}
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", "plan", tmp_path / f"{name}.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    where, blocks, projector, experts = EXPECTED[name]
    shapes = dict(tensors_of(record))
    merged = [f"{where}.{block}.{part}.weight" for block in range(blocks) for part in BLOCK]
    merged += [f"{part}.weight" for part in projector]
    elements = sum(math.prod(shapes[tensor]) for tensor in merged)
    lines = [line.split() for line in done.stdout.splitlines()]
    cells = [" ".join(line) for line in lines]
    assert any(cell.startswith(f"tensors {len(merged)} merged of {len(shapes)}") for cell in cells)
    everything = sum(math.prod(shape) for shape in shapes.values())
    # The exact number of elements shows that no tensor of the vision tower is merged.
    assert f"elements {elements:,} merged of {everything:,}" in cells
    merged_bytes = f"merged bytes {rich.filesize.decimal(2 * elements)}"
    assert any(cell.startswith(merged_bytes) and "bfloat16" in cell for cell in cells)
    assert any(cell.startswith(f"coefficients {len(merged)} ") for cell in cells)
    budget = int(recipe["parameters"]["budget"] * len(merged))
    assert any(f" {budget} " in cell and "stage 2" in cell for cell in cells)
    assert f"hidden layers {blocks // 2}" in cells
    assert any(cell.startswith(f"expert forwards {sum(experts.values())}") for cell in cells)
    prior = str(recipe["parameters"]["weight"])
    rows = [line for line in lines if line and line[0] in experts]
    assert [(line[0], line[1], line[2], line[4]) for line in rows] == [
        (expert, "checkpoint", prior, str(samples)) for expert, samples in experts.items()
    ]
    assert [line[-1] for line in rows] == [f"{model['model']}@{COMMIT}" for model in recipe["models"]]


def test_the_recorded_headers_are_what_their_generator_writes() -> None:
    generator = runpy.run_path(str(HEADERS / "record.py"))
    records = generator["make"]()
    assert set(records) == set(EXPECTED) == {path.stem for path in RECIPES.glob("*.yaml")}
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
