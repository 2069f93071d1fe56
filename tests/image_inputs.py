"""Reference inputs of models that take images, made as their users do, without the engine's encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_images
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from engine.models.loading import load_processor

CONTEXT = "<IMG_CONTEXT>"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def inputs_of(config: Path) -> list[list[dict[str, Any]]]:
    """Return, for each expert of a merge.yaml, the forward arguments of each of its samples."""
    raw = yaml.safe_load(config.read_text())
    base = config.parent / raw["base_model"]
    make = from_chat if "trust_remote_code" in raw else from_processor
    files = [config.parent / model["calibration"] for model in raw["models"]]
    return [[make(base, record, file.parent) for record in json.loads(file.read_text())] for file in files]


def from_processor(base: Path, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the inputs of a record as `apply_chat_template` of transformers makes them."""
    seen = [{"type": "image", "image": Image.open(folder / record["image_path"])}] if "image_path" in record else []
    messages = [{"role": "user", "content": [*seen, {"type": "text", "text": record["question"]}]}]
    answer = record.get("response")
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    made = load_processor(base).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=not answer
    )
    return dict(made)


def from_chat(base: Path, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the inputs of a record as OpenGVLab's `chat` makes them, with the template of `remote_internvl`."""
    config = json.loads((base / "config.json").read_text())
    seen = "image_path" in record
    pixels = (
        tiles(Image.open(folder / record["image_path"]), tiny_images.SIDE, config["max_dynamic_patch"])
        if seen
        else None
    )
    part = (tiny_images.SIDE // tiny_images.PATCH) ** 2 // 4
    image = f"<img>{CONTEXT * (part * len(pixels))}</img>\n" if seen else ""
    answer = f"assistant: {record['response']} </s> " if record.get("response") else "assistant: "
    text = f"<s> w47 w48 w49 user: {image}{record['question']} </s> {answer}"
    ids = AutoTokenizer.from_pretrained(base, trust_remote_code=True)(text, return_tensors="pt").input_ids
    flags = torch.ones(len(pixels), dtype=torch.long) if seen else torch.zeros(1, dtype=torch.long)
    pixels = pixels if seen else torch.zeros(1, 3, tiny_images.SIDE, tiny_images.SIDE)
    return {"input_ids": ids, "pixel_values": pixels, "image_flags": flags}


def tiles(image: Image.Image, side: int, most: int) -> Tensor:
    """Return the normalised tiles of an image, [tiles, 3, side, side], and a thumbnail if there are several tiles.

    The grid has at most `most` tiles and the nearest aspect ratio. Of equally near grids, the larger one is chosen if
    the image has more than half its pixels.
    """
    image = image.convert("RGB")
    wanted, area = image.width / image.height, image.width * image.height
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(wanted - columns / rows)
        if distance < nearest or (distance == nearest and area > side * side * columns * rows / 2):
            best, nearest = (columns, rows), distance
    whole = image.resize((side * best[0], side * best[1]), Image.Resampling.BICUBIC)
    corners = [(x * side, y * side) for y in range(best[1]) for x in range(best[0])]
    parts = [whole.crop((x, y, x + side, y + side)) for x, y in corners]
    parts += [image.resize((side, side), Image.Resampling.BICUBIC)] if len(parts) > 1 else []
    pixels = torch.stack([torch.from_numpy(np.array(part)) for part in parts]).float() / 255
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2)
