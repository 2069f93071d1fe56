"""What a written answer is worth: exact match, token F1, and which of several choices it is. Texts in, numbers out.

Sources: of F1 SQuAD's evaluation script, arXiv 1606.05250. Needs no torch, and knows no models.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

LETTERS = string.ascii_uppercase


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(written: str, response: str) -> float:
    """1 where the two are the same but for white space around them, else 0."""
    return float(written.strip() == response.strip())


def f1(written: str, response: str) -> float:
    """SQuAD's token F1, 0 to 1: the harmonic mean of precision and recall of the words that both have.

    Words are lower case, without punctuation and without `a`, `an`, `the`. Where either has none: whether both have.
    """
    mine, wanted = _words(written), _words(response)
    common = sum((Counter(mine) & Counter(wanted)).values())
    if not mine or not wanted:
        return float(mine == wanted)
    return 2 * common / (len(mine) + len(wanted))


def chosen(written: str, choices: Sequence[str]) -> int | None:
    """Which choice an answer begins with, by its text or else by its letter; None: with none of them.

    Of choices that begin alike it is the longest. A letter stands alone or before one of `.):,`: `B`, `(B)`, `B. …`.
    """
    text = written.strip()
    for choice in sorted(choices, key=len, reverse=True):
        start = choice.strip()
        if text.lower().startswith(start.lower()) and not text[len(start) : len(start) + 1].isalnum():
            return choices.index(choice)
    letter = re.match(r"\(?([A-Z])(?:[.):,]|$)", text)
    place = LETTERS.index(letter[1]) if letter else len(choices)
    return place if place < len(choices) else None


def _words(text: str) -> list[str]:
    bare = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
