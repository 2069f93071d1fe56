"""The correspondence between the tensors of an expert and those of the base, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` (exclusive) of the flattened tensor `name` of an expert."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Match:
    """Exceptions from equal names.

    Attributes:
        renamed: Base tensor → the expert's name for it.
        parts: Base tensor → the parts of the expert's tensors that it consists of, where the two files divide a
            parameter differently.
        absent: Base tensors that the expert lacks; their task vector is zero.
        ignored: Tensors of the expert that are not used.
        tied: Heads among these, with the embedding that each must equal.
        wrapped: A tensor's name with the prefix of a wrapper, if the expert's tensors have one.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    wrapped: str = ""

    def names(self, tensor: str) -> tuple[str, ...]:
        """Return the names of the expert's tensors that a tensor of the base is compared with."""
        if tensor in self.absent:
            return ()
        parts = self.parts.get(tensor)
        return tuple(part.name for part in parts) if parts else (self.renamed.get(tensor, tensor),)


NO_EXCEPTIONS = Match()
