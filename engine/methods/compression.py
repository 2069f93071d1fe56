"""The methods that make mixtures of experts smaller (`python cli.py compress`), and their options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.fields import Float, Int, Section

Alignment = Literal["activations", "weights", "none"]
MOST_EXPERTS = 100_000


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
