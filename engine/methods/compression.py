"""What makes mixtures of experts smaller (`compress`) and task vectors (`compress-delta`), and the options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.fields import Float, Int, Section
from engine.packing import MOST_BITS

# Of compressed task vectors: bits and number of singular parts of each group, None for as many as there is space for.
Bits = tuple[tuple[int, int | None], ...]
# Delta-CoMe, arXiv 2406.08903: two parts of 8 bits, 32 of 3, and others of 2, in a sixteenth of the 16-bit matrix.
BITS, SIZE = "8:2,3:32,2", 1 / 16
Alignment = Literal["activations", "weights", "none"]
MOST_EXPERTS = 100_000
MOST_PARTS = 1_000_000


def parse_bits(text: str) -> Bits:
    """Return groups of singular parts from a text such as `8:2,3:32,2`: bits, and after a colon the number of parts.

    Raises:
        ValueError: It is none, or has a group after one without a number.
    """
    groups = list[tuple[int, int | None]]()
    for part in text.split(","):
        bits, colon, count = part.strip().partition(":")
        if not bits.isdecimal() or not 1 <= int(bits) <= MOST_BITS or (colon and not count.isdecimal()):
            raise ValueError(f"{part.strip()!r} is no group: BITS or BITS:PARTS, with 1 to {MOST_BITS} bits")
        if groups and groups[-1][1] is None:
            raise ValueError("only the last group can be without a number of parts")
        if colon and not 0 < int(count[:9]) <= MOST_PARTS:
            raise ValueError(f"{part.strip()!r} has no parts, or more than {MOST_PARTS:,}")
        groups.append((int(bits), int(count) if colon else None))
    return tuple(groups)


class Compression(Section):
    """The section `compress`.

    Attributes:
        method: How experts are grouped and merged.
        experts: The experts that are left in each layer: a number, or a share of those that there are.
        group_size: Of `ream`: the most experts that become one.
        align: What decides the order of hidden units in which experts are averaged: their activations and weights, the
            weights alone, or nothing: the order stays. None: as the paper of the method does.
        rank: Of `sub_moe`: the share of the singular directions of a group's weights that are kept.
        sequential: The statistics of a layer are those behind the layers that are compressed already. None: as the
            paper of the method does.
    """

    method: Literal["ream", "m_smoe", "sub_moe"] = "ream"
    experts: Annotated[Int, Field(ge=1, le=MOST_EXPERTS)] | Annotated[Float, Field(gt=0, lt=1)]
    group_size: Annotated[Int, Field(ge=2, le=MOST_EXPERTS)] = 16
    align: Alignment | None = None
    rank: Annotated[Float, Field(gt=0, le=1)] = 1.0
    sequential: bool | None = None

    @property
    def alignment(self) -> Alignment:
        """`align`, or that of the method's paper."""
        of_papers: dict[str, Alignment] = {"ream": "activations", "m_smoe": "weights", "sub_moe": "none"}
        return self.align or of_papers[self.method]

    @property
    def in_sequence(self) -> bool:
        """`sequential`, or that of the method's paper."""
        return self.method == "ream" if self.sequential is None else self.sequential
