"""The picture of the coefficients beside the model card, a PNG: experts down, merged tensors across."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from engine.planning.plan import in_order_of_use
from engine.task_vectors.coefficients import Array, Coefficients

# Sizes in pixels: of the whole row of tensors, of the row of an expert, of the text, and of its column of names.
WIDTH, HEIGHT, TEXT, NAMES = 840, 26, 13, 200
# The most experts, and characters of a name, that are drawn.
ROWS, NAME = 64, 28
# The colours of the largest distances above and below the prior, which is white.
ABOVE, BELOW, INK = np.array([178, 24, 43]), np.array([33, 102, 172]), (60, 60, 60)


def draw_coefficients(path: Path, names: Sequence[str], priors: Sequence[float], learned: Coefficients) -> None:
    """Write a PNG of the distance of every coefficient from its prior, the mean over the chunks of a tensor.

    A row per expert (the first ROWS), a column per tensor, from the first block to the last.
    """
    tensors = in_order_of_use(learned.layout.tensors)
    columns = [learned.layout.columns[name] for name in tensors]
    means_KL = np.stack([learned.values[:, one].mean(axis=1) for one in columns], axis=1)
    off_KL = (means_KL - np.array(priors)[:, None])[:ROWS]
    most = float(np.abs(off_KL).max()) or 1.0
    rows, top = len(off_KL), HEIGHT
    image = Image.new("RGB", (NAMES + WIDTH + 10, top + HEIGHT * (rows + 2)), "white")
    cells = Image.fromarray(_colours(off_KL / most)).resize((WIDTH, HEIGHT * rows), Image.Resampling.NEAREST)
    image.paste(cells, (NAMES, top))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    for row, name in enumerate(names[:ROWS]):
        text = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
        pen.text((NAMES - 8, top + HEIGHT * row + HEIGHT // 2), text, INK, font, anchor="rm")
    pen.rectangle((NAMES - 1, top - 1, NAMES + WIDTH, top + HEIGHT * rows), outline=(200, 200, 200))
    free: float = NAMES
    for block, start, stop in _blocks(tensors):
        left, right = (NAMES + WIDTH * place // len(tensors) for place in (start, stop))
        width = pen.textlength(block, font)
        if left >= free and width <= max(right - left, 24):
            pen.text((left, top - 4), block, INK, font, anchor="ls")
            free = left + width + 12
    pen.text((NAMES - 8, top - 4), "block", INK, font, anchor="rs")
    legend = f"red: {most:.2g} above the prior, white: the prior, blue: {most:.2g} below it"
    pen.text((NAMES, top + HEIGHT * rows + 8), legend, INK, font)
    image.save(path, optimize=True)


def _colours(share_KL: Array) -> npt.NDArray[np.uint8]:
    """Return colours [K, L, 3] of values from -1 to 1."""
    strength_KL1 = np.abs(share_KL)[..., None]
    ends_KL3 = np.where((share_KL > 0)[..., None], ABOVE, BELOW)
    colours_KL3: npt.NDArray[np.uint8] = np.round(255 + strength_KL1 * (ends_KL3 - 255)).astype(np.uint8)
    return colours_KL3


def _blocks(tensors: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the number of each block with the places of its first tensor and of the one after its last."""
    found = []
    numbered = [(re.search(r"\.(\d+)\.", name), place) for place, name in enumerate(tensors)]
    for block, group in groupby(numbered, key=lambda pair: pair[0][1] if pair[0] else ""):
        places = [place for _, place in group]
        found.append((block, places[0], places[-1] + 1))
    return [one for one in found if one[0]]
