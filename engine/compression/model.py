"""The smaller model: a view of a model's files and of what is stored of its layers, tensor by tensor.

compressed/N.safetensors    of a layer: the groups, the merged experts, and the rows of the router
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.headers import FLOATS
from engine.compression.families import COUNTS, FOLDER, experts_kept
from engine.compression.layout import ExpertLayout
from engine.compression.merging import GatedExpert
from engine.correction.files import load_sealed_tensors
from engine.models.skeleton import build_skeleton
from engine.planning.open_models import load_base_config, open_base
from engine.planning.plan import Plan
from engine.storage.folder import Folder


def layer_file(number: int) -> str:
    """Return the file of a layer in the state."""
    return f"{FOLDER}/{number}.safetensors"


class CompressedModel:
    """The smaller model of a plan, as far as its layers are compressed.

    Attributes:
        settings: The method.
        kept: N, the experts of each layer.
        layout: Where the experts of the model are.
    """

    def __init__(self, plan: Plan, state: Folder) -> None:
        assert plan.config.compress is not None
        self.plan, self.state, self.settings = plan, state, plan.config.compress
        self.base = open_base(plan)
        _, places = build_skeleton(
            load_base_config(plan), plan.base_header.tensors, getattr(torch, plan.dtype), self.base.folder
        )
        self.layout, self.kept = ExpertLayout(plan.base_header, places), experts_kept(plan.base_header, self.settings)
        self._held: tuple[str, dict[str, Tensor]] = "", {}

    @cached_property
    def smaller(self) -> Plan:
        """The plan with the header of the smaller model."""
        return replace(self.plan, base=replace(self.plan.base, header=self.layout.smaller(self.kept)))

    def config(self) -> Any:
        """Return the config of the smaller model, as transformers has it."""
        config = load_base_config(self.plan)
        for key in (key for key in COUNTS if hasattr(config, key)):
            setattr(config, key, self.kept)
        return config

    def stored(self, layer: str) -> dict[str, Tensor]:
        """Return what is stored of a layer. One layer is in memory at a time."""
        if self._held[0] != layer:
            self._held = layer, load_sealed_tensors(self.state, layer_file(self.layout.layers.index(layer)))
        return self._held[1]

    def is_stored(self, layer: str) -> bool:
        """Return whether a layer is compressed."""
        return self.state.exists(layer_file(self.layout.layers.index(layer)))

    def expert(self, layer: str, index: int) -> GatedExpert:
        """Return an expert of a compressed layer: a merged one, or one as it is in the files."""
        tensors = self.stored(layer)
        if f"{index}.gate" in tensors:
            return GatedExpert(*(tensors[f"{index}.{name}"] for name in ("gate", "up", "down")))
        return self.layout.expert(self.base.read, layer, int(tensors["dominant"][index]))

    def router(self, layer: str) -> Mapping[str, Tensor]:
        """Return the tensors of a compressed layer's router by their names in the module."""
        return self.stored(layer)

    def parts(self, name: str) -> Iterator[Tensor]:
        """Return the consecutive parts of a tensor of the smaller model, in its dtype."""
        parts = self.layout.parts(name, self.expert, self.kept, self.router)
        return iter([self.base.read(name)]) if parts is None else parts

    def read(self, name: str) -> Tensor:
        """Return a tensor of the smaller model."""
        shape = self.smaller.base_header.tensors[name].shape
        return torch.cat([part.reshape(-1) for part in self.parts(name)]).view(shape)

    def dtype(self, layer: str) -> torch.dtype:
        """Return the dtype of a layer's experts in the files."""
        header = self.layout.header.tensors
        name = next(
            name for name, place in self.layout.places.items() if place.parameter.startswith(f"{layer}.experts")
        )
        return getattr(torch, FLOATS[header[name].dtype])  # type: ignore[no-any-return]
