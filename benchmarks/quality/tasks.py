"""The skills of two benches as seeded streams of (question, answer), and their calibration pool, validation and test.

Options are chosen on bench A, never on bench B. Of A's five skills, dates, number words and sorting come from the
quickstart; times of day and JSON extraction are added. `tasks_b.py` has those of bench B. No question is in two splits,
and training leaves out the questions of all splits.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
import tasks_b
from skills import SKILLS as QUICKSTART
from skills import Example, Skill, in_words, stream

# Questions per split. Calibration samples are drawn by seed from a pool; options are chosen on the validation split.
SIZES = {"calibration": 100, "validation": 60, "test": 200}

NAMES = "Alice Bruno Carla David Elena Felix Greta Hugo Irene Jonas Karin Lucas Maria Nadia Oscar Paula Quentin Rosa \
Simon Teresa Ursula Victor Wanda Xavier Yvonne Zoe".split()
CITIES = "Athens Berlin Cairo Dublin Geneva Hanoi Istanbul Jakarta Kyoto Lisbon Madrid Nairobi Oslo Paris Quito Rome \
Sydney Tunis Vienna Warsaw Zurich Boston Chicago Denver Lima Mumbai".split()
JOBS = "baker farmer doctor teacher pilot lawyer painter nurse plumber singer writer driver".split()
SENTENCES = [
    "{name} is {age} years old and works as a {job} in {city}.",
    "In {city} lives {name}, a {job} aged {age}.",
    "Meet {name}, {age}, {job}, from {city}.",
    "The {job} {name} moved to {city} at the age of {age}.",
]


def clock(rng: random.Random) -> Example:
    """Return a time of day in words, and in 24-hour format."""
    minute, hour, half = rng.randint(1, 59), rng.randint(1, 11), rng.choice(["morning", "evening"])
    if rng.random() < 0.5:
        written = f"{in_words(minute)} minutes past {in_words(hour)} in the {half}"
    else:
        written = f"{in_words(60 - minute)} minutes to {in_words(hour + 1)} in the {half}"
    return f"Write this time in 24-hour format: {written}", f"{hour + 12 * (half == 'evening'):02d}:{minute:02d}"


def extraction(rng: random.Random) -> Example:
    """Return a sentence about a person, and its facts as JSON."""
    facts = {"name": rng.choice(NAMES), "age": rng.randint(18, 90), "job": rng.choice(JOBS), "city": rng.choice(CITIES)}
    sentence = rng.choice(SENTENCES).format(**facts)
    return f"Extract name, age and city as JSON: {sentence}", json.dumps({k: facts[k] for k in ("name", "age", "city")})


BENCHES: dict[str, dict[str, Skill]] = {
    "a": {**QUICKSTART, "clock": clock, "extraction": extraction},
    "b": tasks_b.SKILLS,
}
SKILLS = BENCHES["a"] | BENCHES["b"]


def splits(skill: str) -> dict[str, list[Example]]:
    """Return the skill's splits, which are always the same and have no question in common."""
    examples = stream(skill, 0, SKILLS)
    return {split: [next(examples) for _ in range(size)] for split, size in SIZES.items()}


def training_stream(skill: str) -> Iterator[Example]:
    """Return training examples, none of which has a question of a split."""
    kept = {question for examples in splits(skill).values() for question, _ in examples}
    return (example for example in stream(skill, 1, SKILLS) if example[0] not in kept)
