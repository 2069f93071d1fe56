"""Where the experts and routers of a mixture stand in its modules and its files, and the tensors of the smaller model.

Files have a tensor for each expert and projection, or the fused parameters of the modules. Letters: E experts of the
model, N of the smaller one, I hidden units of an expert, H features.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from engine.checkpoints.headers import ModelHeader, TensorHeader
from engine.compression.families import number_of_experts, smaller_config
from engine.compression.merging import GatedExpert
from engine.models.names import Places

Read = Callable[[str], Tensor]
GATE_UP, DOWN, ROUTER = ".experts.gate_up_proj", ".experts.down_proj", ".gate.weight"
# A value that DeepSeek-V3 adds to each expert's score when it chooses.
CORRECTION = ".gate.e_score_correction_bias"


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a model.

    Attributes:
        header: The header of the model.
        places: The place of each tensor in the module, by its name in the files.
    """

    header: ModelHeader
    places: Places

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The modules that have experts, such as `model.layers.3.mlp`, in the order of the files."""
        names = (place.parameter for place in self.places.values() if place.parameter.endswith(GATE_UP))
        return tuple(dict.fromkeys(name.removesuffix(GATE_UP) for name in names))

    @cached_property
    def count(self) -> int:
        """E."""
        return number_of_experts(self.header)

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """The hidden units and the features, (I, H), of the experts of each layer."""
        found = {}
        for layer in self.layers:
            (router,) = self._tensors[f"{layer}{ROUTER}"]
            features = self.header.tensors[router].shape[1]
            elements = sum(self.header.tensors[name].numel for name in self._tensors[f"{layer}{DOWN}"])
            found[layer] = elements // (self.count * features), features
        return found

    def layer_of(self, block: str) -> str | None:
        """Return the module of a block that has experts, or None if it has none."""
        return next((layer for layer in self.layers if layer.startswith(f"{block}.")), None)

    def expert(self, read: Read, layer: str, index: int) -> GatedExpert:
        """Return the weights of an expert as they are stored."""
        units, features = self.widths[layer]
        size = units * features
        gate, up = (self._part(read, f"{layer}{GATE_UP}", (2 * index + half) * size, size) for half in (0, 1))
        down = self._part(read, f"{layer}{DOWN}", index * size, size)
        return GatedExpert(gate.view(units, features), up.view(units, features), down.view(features, units))

    def router(self, read: Read, layer: str) -> dict[str, Tensor]:
        """Return the tensors of a layer's router, which have a row an expert, by their names in the module."""
        parameters = [f"{layer}{name}" for name in (ROUTER, CORRECTION)]
        return {one: read(self._tensors[one][0]) for one in parameters if one in self._tensors}

    def smaller(self, kept: int) -> ModelHeader:
        """Return the header of the model with N experts a layer. What transformers does not read is left out."""
        tensors = {}
        for name, place in self.places.items():
            tensor = self.header.tensors[name]
            layer, ending = _split(place.parameter)
            if layer not in self.widths:
                tensors[name] = tensor
            elif ending in (ROUTER, CORRECTION) or self._is_whole(tensor, place.parameter):
                tensors[name] = replace(tensor, shape=(kept, *tensor.shape[1:]))
            elif self._expert_of(place.parameter, place.start) < kept:
                tensors[name] = tensor
        return replace(self.header, config=smaller_config(self.header.config, kept), tensors=tensors)

    def parts(
        self,
        name: str,
        expert: Callable[[str, int], GatedExpert],
        kept: int,
        router: Callable[[str], Mapping[str, Tensor]],
    ) -> Iterator[Tensor] | None:
        """Return the consecutive parts of a tensor of the smaller model; None for one that is as in the model.

        Args:
            name: Its name in the files.
            expert: Returns an expert of a layer of the smaller model.
            kept: N.
            router: Returns the tensors of a layer's router; see `router`.
        """
        place, tensor = self.places[name], self.header.tensors[name]
        layer, ending = _split(place.parameter)
        if layer not in self.widths:
            return None
        if ending in (ROUTER, CORRECTION):
            return iter([router(layer)[place.parameter]])
        if self._is_whole(tensor, place.parameter):
            return (part for index in range(kept) for part in _projections(expert(layer, index), ending))
        size = math.prod(self.widths[layer])
        index = self._expert_of(place.parameter, place.start)
        half = place.start // size % (2 if ending == GATE_UP else 1)
        return iter([_projections(expert(layer, index), ending)[half]])

    @cached_property
    def _tensors(self) -> dict[str, list[str]]:
        """The names in the files of the parts of each parameter and buffer."""
        found = defaultdict[str, list[str]](list)
        for name, place in self.places.items():
            found[place.parameter].append(name)
        return dict(found)

    def _part(self, read: Read, parameter: str, start: int, size: int) -> Tensor:
        """Return consecutive elements of a parameter, which are all in one tensor of the files."""
        for name in self._tensors[parameter]:
            first, numel = self.places[name].start, self.header.tensors[name].numel
            if first <= start and start + size <= first + numel:
                return read(name).reshape(-1)[start - first : start - first + size]
        raise AssertionError(f"{parameter} has no tensor of elements {start} to {start + size}")

    def _expert_of(self, parameter: str, start: int) -> int:
        layer, ending = _split(parameter)
        return start // (math.prod(self.widths[layer]) * (2 if ending == GATE_UP else 1))

    def _is_whole(self, tensor: TensorHeader, parameter: str) -> bool:
        return len(self._tensors[parameter]) == 1 and len(tensor.shape) == 3


def _projections(one: GatedExpert, ending: str) -> Sequence[Tensor]:
    return (one.gate, one.up) if ending == GATE_UP else (one.down,)


def _split(parameter: str) -> tuple[str, str]:
    """Return the module of a parameter of experts or of a router, and the rest of its name; else two empty texts."""
    ending = next((one for one in (GATE_UP, DOWN, ROUTER, CORRECTION) if parameter.endswith(one)), "")
    return (parameter.removesuffix(ending), ending) if ending else ("", "")
