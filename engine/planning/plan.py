"""A part of the house that has no words of its own yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.headers import BYTES, FLOATS, SAFETENSORS, ModelHeader
from engine.checkpoints.match import NO_EXCEPTIONS, Match
from engine.checkpoints.vocabulary import has_tokens_for_rows, is_matrix
from engine.config.schema import Config


@dataclass(frozen=True)
class ModelPlan:
    """Where a model is, as any node can find it: an absolute path, or a hub id with its commit."""

    model: str
    header: ModelHeader | AdapterHeader


@dataclass(frozen=True)
class ExpertPlan(ModelPlan):
    """One expert θₖ: its prior ᾱₖ (None: still to be found), loss weight βₖ, and the files and number of its
    calibration samples.
    """

    name: str
    weight: float | None
    loss_weight: float
    calibration: tuple[Path, ...]
    samples: int
    match: Match = NO_EXCEPTIONS
    # An adapter of this expert (mergekit's model+lora), where it is not one of the base.
    adapter: ModelPlan | None = None

    @property
    def kind(self) -> str:
        """What its task vector is made of."""
        if self.adapter is not None:
            return "checkpoint and adapter"
        return "adapter" if isinstance(self.header, AdapterHeader) else "checkpoint"


@dataclass(frozen=True)
class Plan:
    """A whole merge. `merged` are the names of the merged tensors ℓ in the order of the base's files."""

    config: Config
    base: ModelPlan
    experts: tuple[ExpertPlan, ...]
    merged: tuple[str, ...]
    dtype: str
    hidden_layers: tuple[int, ...]
    # Whose tokenizer the output has, as any node can find it; None: the base's.
    tokenizer: str | None = None
    # Whose rows embedding and head have beyond the base's own (or: how many of the base's are left).
    rows: ModelPlan | None = None
    # Image files of each expert's samples, once its records have been read.
    images: tuple[tuple[str, ...], ...] = ()

    @property
    def base_header(self) -> ModelHeader:
        """The base's tensors."""
        assert isinstance(self.base.header, ModelHeader)
        return self.base.header

    @property
    def priors(self) -> list[float]:
        """ᾱₖ of every expert, found or given."""
        given = [expert.weight for expert in self.experts]
        found = [weight for weight in given if weight is not None]
        assert len(found) == len(given), "a prior that is still to be found"
        return found

    @cached_property
    def merged_set(self) -> frozenset[str]:
        """`merged`, for membership."""
        return frozenset(self.merged)

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements nₗ of each merged tensor."""
        return {name: self.base_header.tensors[name].numel for name in self.merged}

    @cached_property
    def depths(self) -> dict[str, float]:
        """Where each tensor's layer stands, from 0 to 1 for gradients over layers; 0 for tensors of no layer."""
        places = {name: re.match(r"(.*?)\.(\d+)\.", name) for name in self.base_header.tensors}
        counts: dict[str, int] = {}
        for place in places.values():
            if place:
                counts[place[1]] = max(counts.get(place[1], 0), int(place[2]) + 1)
        return {
            name: 0.0 if not place else int(place[2]) / (count - 1) if (count := counts[place[1]]) > 1 else 1.0
            for name, place in places.items()
        }

    @cached_property
    def orthogonal(self) -> tuple[str, ...]:
        """The merged tensors whose task vectors are made orthogonal: matrices, where the config asks for it."""
        if not self.config.learned or self.config.parameters.task_vectors != "orthogonal":
            return ()
        header = self.base_header
        return tuple(n for n in self.merged if is_matrix(header.tensors[n].shape, has_tokens_for_rows(header, n)))

    @property
    def merged_bytes(self) -> int:
        """M: bytes of the merged tensors in the run's dtype, what an optimiser step moves once each way."""
        return sum(self.numels.values()) * BYTES[SAFETENSORS[self.dtype]]

    def out_dtype(self, name: str) -> str:
        """The dtype, as safetensors writes it, in which a tensor is written.

        Without `out_dtype` and `dtype` a tensor keeps the base's; types that are not floats always do.
        """
        own = self.base_header.tensors[name].dtype
        chosen = self.config.out_dtype or self.config.dtype
        return SAFETENSORS[chosen] if chosen and own in FLOATS else own


def in_order_of_use(names: Iterable[str]) -> list[str]:
    """Names as a model goes through them: block 2 before block 10, where files often have it the other way round."""
    return sorted(names, key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)])


def slices(plan: Plan, count: int) -> list[tuple[str, ...]]:
    """The merged tensors in `count` slices of about equal bytes, each in the order of the base's files.

    Largest first, each to the slice that has least: the greedy rule of list scheduling. Some may be empty.
    """
    loads, owner = [0] * count, {}
    for name in sorted(plan.merged, key=lambda name: (-plan.numels[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += plan.numels[name]
    return [tuple(name for name in plan.merged if owner[name] == index) for index in range(count)]
