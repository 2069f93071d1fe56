"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Match:
    """The exceptions: base tensor → the expert's name for it, base tensors that the expert leaves as they are, and what
    of the expert is not used.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()


NO_EXCEPTIONS = Match()
