"""The pictures of the vision benchmark: the same from a seed, disjoint splits, answers that agree with the cells."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.vision import pictures
from benchmarks.vision.pictures import CELL, COLOURS, DIGITS, GRID, KINDS, NUMBERS, SHAPES, SKILLS, Picture

every_skill = pytest.mark.parametrize("skill", SKILLS)


def shown(picture: Picture) -> list[tuple[int, str]]:
    """The cells that are not empty, and what they hold."""
    return [(cell, KINDS[kind]) for cell, kind in enumerate(picture.cells) if kind]


def bars(picture: Picture) -> dict[str, int]:
    """The height of each colour's bar, in half cells."""
    heights: dict[str, int] = {}
    for _, kind in shown(picture):
        colour, part = kind.split()
        heights[colour] = heights.get(colour, 0) + (2 if part == "full" else 1)
    return heights


def answer(skill: str, picture: Picture) -> str:
    """The answer to the picture's question, from the content of its cells alone."""
    asked, things = picture.question.split(), shown(picture)
    if skill == "shapes":
        return things[0 if "top" in asked else -1][1]
    if skill == "counts":
        shape = next(word for word in asked if word in SHAPES)
        return str(sum(shape in kind for _, kind in things))
    if skill == "charts":
        return DIGITS[bars(picture)[next(word for word in asked if word in COLOURS)]]
    read = [DIGITS[NUMBERS.index(kind)] for _, kind in things]
    return " ".join(read if "forwards" in asked else read[::-1])


@every_skill
def test_a_split_is_the_same_every_time_and_shares_no_picture_with_another(skill: str) -> None:
    seen: list[bytes] = []
    for name, size in pictures.SIZES.items():
        first, second = pictures.split(skill, name), pictures.split(skill, name)
        assert len(first) == size
        assert first == second
        seen += [one.image.tobytes() for one in first]
    for purpose in ("training", "description"):
        stream = pictures.training_stream(skill, purpose)
        seen += [next(stream).image.tobytes() for _ in range(200)]
    assert len(set(seen)) == len(seen)


@every_skill
def test_answers_agree_with_the_cells(skill: str) -> None:
    for picture in pictures.split(skill, "test"):
        assert picture.answer == answer(skill, picture)


@every_skill
def test_cells_agree_with_the_pixels(skill: str) -> None:
    # The background is light and grey: a cell holds something if and only if enough of its pixels are far from that.
    for picture in pictures.split(skill, "validation"):
        pixels = np.asarray(picture.image).astype(int)
        drawn = (pixels.max(2) - pixels.min(2) > 60) | (pixels.max(2) < 120)
        shares = drawn.reshape(GRID, CELL, GRID, CELL).mean((1, 3)).ravel()
        assert [share > 0.03 for share in shares] == [kind > 0 for kind in picture.cells]


def test_all_words_are_in_the_vocabulary_and_no_description_answers_a_question() -> None:
    rng = random.Random(0)
    for skill in SKILLS:
        for picture in pictures.split(skill, "validation"):
            question, described = pictures.description(rng, picture)
            for text in (picture.question, picture.answer, question, described):
                assert set(text.split()) <= set(pictures.WORDS)
            assert question != picture.question
    assert len(set(pictures.WORDS)) == len(pictures.WORDS)
    assert set(COLOURS) < set(pictures.WORDS)
