"""Metrics of a generated answer, from texts alone: exact match, token F1, and the choice that it names.

F1 is that of SQuAD's evaluation script (arXiv 1606.05250). Does not need torch.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(written: str, response: str) -> float:
    """Return 1.0 if the texts are equal except for surrounding white space, else 0.0."""
    return float(written.strip() == response.strip())


def f1(written: str, response: str) -> float:
    """Return SQuAD's token F1, 0 to 1: the harmonic mean of precision and recall of the common words.

    Words are compared in lower case, without punctuation and without `a`, `an`, `the`. If a text has no words, the
    result is 1 if neither has any, else 0.
    """
    given, wanted = _words(written), _words(response)
    common = sum((Counter(given) & Counter(wanted)).values())
    if not given or not wanted:
        return float(given == wanted)
    return 2 * common / (len(given) + len(wanted))


def chosen(written: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice with which an answer begins, by its text or else by its letter, or None.

    If several choices match, the longest is taken. A letter must stand alone or before one of `.):,`: `B`, `(B)`,
    `B. …`.
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
