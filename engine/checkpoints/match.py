"""The correspondence between the tensors of an expert and those of the base, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Match:
    """Exceptions from equal names.

    Attributes:
        renamed: Base tensor → the expert's name for it.
        absent: Base tensors that the expert lacks; their task vector is zero.
        ignored: Tensors of the expert that are not used.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()


NO_EXCEPTIONS = Match()
