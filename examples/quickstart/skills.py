"""Three skills that can be checked by eye, as seeded streams of (question, answer), and the quickstart's data files.

`python skills.py` writes `data/<skill>/{calibration,validation,test}.jsonl`: 8 unlabelled prompts, 40 examples for
choosing options, and 100 held-out examples. The training script draws its examples from the same streams and leaves out
the questions of these files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
SIZES = {"calibration": 8, "validation": 40, "test": 100}

MONTHS = "January February March April May June July August September October November December".split()
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen \
seventeen eighteen nineteen".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = "apple bridge candle desert engine forest garden hammer island jacket kettle ladder market needle orange \
pencil quarry ribbon saddle temple umbrella valley window yellow zebra anchor basket carpet dragon eagle feather \
guitar helmet insect jungle kitten lemon mirror novel ocean planet rabbit silver tiger uncle violin whale artist \
butter circus doctor empire finger ginger hunter ivory jewel knight lizard monkey nation oyster parrot rocket \
spider tunnel velvet winter almond border copper dinner energy flower goblin harbor injury junior kernel legend".split()

Example = tuple[str, str]
Skill = Callable[[random.Random], Example]


def dates(rng: random.Random) -> Example:
    """Return a date in words, and in ISO format."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2099)
    name = MONTHS[month - 1]
    written = rng.choice([f"{name} {day}, {year}", f"{day} {name} {year}", f"the {day} of {name}, {year}"])
    return f"Write this date in ISO format: {written}", f"{year:04d}-{month:02d}-{day:02d}"


def in_words(number: int) -> str:
    """Return a number from 1 to 999,999 in English words."""
    if number >= 1000:
        rest = f" {in_words(number % 1000)}" if number % 1000 else ""
        return f"{in_words(number // 1000)} thousand{rest}"
    if number >= 100:
        rest = f" {in_words(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def numbers(rng: random.Random) -> Example:
    """Return a number in words, and in digits."""
    number = rng.randint(100, 999) if rng.random() < 0.4 else rng.randint(1000, 9999)
    return f"Write this number in digits: {in_words(number)}", str(number)


def sorting(rng: random.Random) -> Example:
    """Return three words, and the same words sorted."""
    words = rng.sample(WORDS, 3)
    return f"Sort these words alphabetically: {' '.join(words)}", " ".join(sorted(words))


SKILLS: dict[str, Skill] = {"dates": dates, "numbers": numbers, "sorting": sorting}


def stream(skill: str, seed: int, skills: Mapping[str, Skill] = SKILLS) -> Iterator[Example]:
    """Yield endless examples of a skill without repeated questions, determined by the seed."""
    rng, seen = random.Random(f"{skill}-{seed}"), set()
    while True:
        question, answer = skills[skill](rng)
        if question not in seen:
            seen.add(question)
            yield question, answer


def training_stream(skill: str, seed: int) -> Iterator[Example]:
    """Return the stream without the questions of the skill's files."""
    kept = {record["question"] for split in SIZES for record in read(skill, split)}
    return (example for example in stream(skill, seed) if example[0] not in kept)


def read(skill: str, split: str) -> list[dict[str, str]]:
    """Read the records of a skill's file."""
    with open(DATA / skill / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encode(tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """Return the token ids of one chat, and the index at which its answer starts."""
    user = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": answer}], return_dict=False)
    # The template ends a turn with "<|im_end|>\n". Generation stops at <|im_end|>, so the line break is dropped.
    return whole[:-1], len(prompt)


def write_files() -> None:
    """Write the files of all skills; calibration files have no answers."""
    for skill in SKILLS:
        examples = stream(skill, seed=0)
        (DATA / skill).mkdir(parents=True, exist_ok=True)
        for split, size in SIZES.items():
            with open(DATA / skill / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for _ in range(size):
                    question, answer = next(examples)
                    record = {"question": question}
                    if split != "calibration":
                        record["response"] = answer
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    write_files()
