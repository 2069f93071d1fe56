"""Write random statistics of a model of `models.py` without running it, in the files that `python cli.py stats` writes.

Their shapes, and so the memory and time of a merge with them, are those of real ones. Letters: I inputs of a layer, R
directions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.statistics.files import StatisticsWriter
from engine.statistics.moments import Moments
from engine.storage.local_folder import LocalFolder, digest

WEIGHTS = "model.safetensors"
# Layers with the same input share its moments.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
SEQUENCES, TOKENS = 4, 4096
RANK = 64


def write(folder: Path, base: Path, model: Path, seed: int) -> None:
    """Write the moments of all linear layers, and what gradients tell of all tensors."""
    folder.mkdir(parents=True)
    generator, writer = torch.Generator().manual_seed(seed), StatisticsWriter(LocalFolder(folder))
    with safe_open(model / WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    groups: dict[str, list[str]] = {}
    for name in sorted(shapes):
        *_, layer, _ = name.split(".")
        if ".layers." in name and layer.endswith("_proj"):
            groups.setdefault(name.replace(layer, SHARED.get(layer, layer)), []).append(name)
    for names in groups.values():
        writer.moments([(names, _moments(random((shapes[names[0]][1], RANK))))])
    for name, shape in shapes.items():
        writer.fisher({name: random(shape).square_()})
        value = random(shape)
        writer.sensitivity({name: (value.square(), value)})
    hashes = [{WEIGHTS: digest(of / WEIGHTS)} for of in (base, model)]
    writer.finish(
        base=hashes[0],
        model=hashes[1],
        data="0" * 64,
        sequences=SEQUENCES,
        tokens=TOKENS,
        dtype="float32",
        kinds=("activations", "gram", "fisher", "sensitivity"),
    )


def _moments(leading_IR: Tensor) -> Moments:
    """Return moments whose Gram matrix has these leading directions, and all others."""
    gram_II = (leading_IR @ leading_IR.T).add_(torch.eye(len(leading_IR))).mul_(TOKENS / RANK)
    square_I = gram_II.diagonal().clone()
    return Moments(TOKENS, square_I, (square_I * TOKENS).sqrt_(), gram_II)
