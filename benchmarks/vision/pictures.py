"""Four skills on drawn pictures, as seeded (picture, question, answer), their splits, and the base's descriptions.

A picture has 64 x 64 pixels: a noisy grey background and a grid of 4 x 4 cells with shapes, digits or bars. The same
seed always gives the same picture. The seeds of the splits and of training have no number in common.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pictures per split. Calibration samples are the first ones of a pool; options are chosen on the validation split.
SIZES = {"calibration": 100, "validation": 60, "test": 200}
SIDE, GRID = 64, 4
CELL = SIDE // GRID
COLOURS = {
    "red": (205, 35, 45),
    "green": (35, 150, 65),
    "blue": (45, 85, 205),
    "yellow": (235, 205, 40),
    "purple": (140, 55, 170),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = "zero one two three four five six seven eight nine".split()
DIGITS = tuple("0123456789")
# What a cell may hold, for the training of the vision tower: nothing, a shape, a digit, a part of a bar.
BARS = ("half", "full")
KINDS = ("", *(f"{c} {s}" for c in COLOURS for s in SHAPES), *NUMBERS, *(f"{c} {b}" for c in COLOURS for b in BARS))
FONT = ImageFont.load_default(size=17)


@dataclass
class Picture:
    """A drawn picture and what is in it.

    Attributes:
        image: 64 x 64 pixels, RGB.
        cells: The index in `KINDS` of what each of the 16 cells holds, row by row.
        caption: What is in the picture, without an answer to any skill's question.
        question, answer: A question of the picture's skill.
    """

    image: Image.Image
    cells: list[int] = field(default_factory=lambda: [0] * GRID**2)
    caption: str = ""
    question: str = ""
    answer: str = ""

    def put(self, rng: random.Random, cell: int, colour: str, thing: str) -> None:
        """Draw a shape, or a digit given as a number word, into a cell, at a jittered place."""
        pen, (row, column) = ImageDraw.Draw(self.image), divmod(cell, GRID)
        x, y = (CELL * at + CELL // 2 + rng.randint(-1, 1) for at in (column, row))
        size, fill = rng.randint(5, 6), COLOURS[colour]
        self.cells[cell] = KINDS.index(thing if thing in NUMBERS else f"{colour} {thing}")
        if thing in NUMBERS:
            pen.text((x, y), str(NUMBERS.index(thing)), fill, FONT, anchor="mm")
        elif thing == "circle":
            pen.ellipse((x - size, y - size, x + size, y + size), fill)
        elif thing == "square":
            pen.rectangle((x - size, y - size, x + size, y + size), fill)
        elif thing == "triangle":
            pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill)
        else:
            pen.rectangle((x - size, y - 1, x + size, y + 1), fill)
            pen.rectangle((x - 1, y - size, x + 1, y + size), fill)

    def bar(self, column: int, colour: str, height: int) -> None:
        """Draw a bar of `height` half cells from the bottom of a column."""
        left, top = CELL * column + 3, SIDE - CELL // 2 * height
        ImageDraw.Draw(self.image).rectangle((left, top, left + CELL - 7, SIDE - 1), COLOURS[colour])
        for level in range((height + 1) // 2):
            part = BARS[height >= 2 * level + 2]
            self.cells[GRID * (GRID - 1 - level) + column] = KINDS.index(f"{colour} {part}")


def blank(rng: random.Random) -> Picture:
    """Return a picture without content: light grey with noise."""
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-12, 13, (SIDE, SIDE, 3))
    return Picture(Image.fromarray((rng.randint(205, 240) + noise).astype(np.uint8)))


def shapes(rng: random.Random) -> Picture:
    """Three shapes in different rows and columns; the question is which of them is the first or last from the top."""
    picture, colours = blank(rng), rng.sample(list(COLOURS), 3)
    rows, columns = rng.sample(range(GRID), 3), rng.sample(range(GRID), 3)
    things = [(GRID * rows[i] + columns[i], colours[i], rng.choice(SHAPES)) for i in range(3)]
    for cell, colour, shape in things:
        picture.put(rng, cell, colour, shape)
    side = rng.choice(["top", "bottom"])
    place = rows.index(min(rows) if side == "top" else max(rows))
    picture.caption = listed(things)
    picture.question = f"which shape is nearest to the {side} ?"
    picture.answer = " ".join(things[place][1:])
    return picture


def counts(rng: random.Random) -> Picture:
    """One to five shapes of one kind among two others; the question is how many of a kind there are."""
    picture, kinds = blank(rng), rng.sample(SHAPES, 2)
    number, others = rng.randint(1, 5), rng.randint(0, 2)
    cells, what = sorted(rng.sample(range(GRID**2), number + others)), [kinds[0]] * number + [kinds[1]] * others
    rng.shuffle(what)
    things = [(cell, rng.choice(list(COLOURS)), shape) for cell, shape in zip(cells, what, strict=True)]
    for cell, colour, shape in things:
        picture.put(rng, cell, colour, shape)
    picture.caption = listed(things)
    picture.question, picture.answer = f"how many of kind {kinds[0]} are there ?", DIGITS[number]
    return picture


def charts(rng: random.Random) -> Picture:
    """Four bars; the question is how high one of them is."""
    picture, heights = blank(rng), rng.sample(range(1, 9), GRID)
    colours = rng.sample(list(COLOURS), GRID)
    for column, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        picture.bar(column, colour, height)
    picture.caption = " , ".join(f"{c} bar {NUMBERS[h]}" for c, h in zip(colours, heights, strict=True))
    asked = rng.randrange(GRID)
    picture.question, picture.answer = f"how high is the {colours[asked]} bar ?", DIGITS[heights[asked]]
    return picture


def digits(rng: random.Random) -> Picture:
    """Three digits in a row; the question is the number, forwards or backwards."""
    picture, colour = blank(rng), rng.choice(list(COLOURS))
    first = GRID * rng.randrange(GRID) + rng.randint(0, GRID - 3)
    words = [rng.choice(NUMBERS) for _ in range(3)]
    for place, word in enumerate(words):
        picture.put(rng, first + place, colour, word)
    picture.caption = f"{colour} number {' '.join(words)}"
    way = rng.choice(["forwards", "backwards"])
    read = words if way == "forwards" else words[::-1]
    picture.question, picture.answer = f"read the digits {way}", " ".join(DIGITS[NUMBERS.index(w)] for w in read)
    return picture


def listed(things: list[tuple[int, str, str]]) -> str:
    """Return colours and shapes in the order of their cells."""
    return " , ".join(f"{colour} {shape}" for _, colour, shape in sorted(things))


SKILLS: dict[str, Callable[[random.Random], Picture]] = {
    "shapes": shapes, "counts": counts, "charts": charts, "digits": digits
}  # fmt: skip


def split(skill: str, name: str) -> list[Picture]:
    """Return a split's pictures, which are always the same."""
    return [SKILLS[skill](random.Random(f"{skill}-{name}-{number}")) for number in range(SIZES[name])]


def training_stream(skill: str, purpose: str = "training") -> Iterator[Picture]:
    """Yield endless pictures of a skill, none with the seed of a split's picture."""
    number = 0
    while True:
        yield SKILLS[skill](random.Random(f"{skill}-{purpose}-{number}"))
        number += 1


WORDS = (
    *(*COLOURS, *SHAPES, *NUMBERS, *DIGITS, *"describe the picture . , bar number repeat row column nothing".split()),
    *"what is in which shape nearest to top bottom ? how many of kind are there high half full".split(),
    *"read digits forwards backwards".split(),
)


def description(rng: random.Random, picture: Picture) -> tuple[str, str]:
    """Return a task that is none of the skills: describe the picture, name a cell's content, or repeat words."""
    task, cell = rng.random(), rng.randrange(GRID**2)
    if task < 0.5:
        return "describe the picture .", picture.caption
    if task < 0.9:
        kind = KINDS[picture.cells[cell]].replace("half", "bar").replace("full", "bar")
        row, column = (NUMBERS[1 + at] for at in divmod(cell, GRID))
        return f"what is in row {row} column {column} ?", kind or "nothing"
    words = " ".join(rng.choices(WORDS, k=rng.randint(2, 5)))
    return f"repeat {words}", words


def descriptions() -> Iterator[tuple[Picture, str, str]]:
    """Yield the base's training data: pictures of all skills in turn, each with a task that is none of the skills."""
    rng = random.Random("descriptions")
    for pictures in zip(*(training_stream(skill, "description") for skill in SKILLS), strict=True):
        for picture in pictures:
            yield picture, *description(rng, picture)
