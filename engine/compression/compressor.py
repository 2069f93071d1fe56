"""The work of an actor that makes a model smaller: samples run through it block by block, and each layer is compressed.

In memory are the samples' hidden states, the inputs of one layer of experts, and the weights of one block, twice if the
samples run through the compressed blocks. A layer that is stored is not compressed again, so another actor can go on:
the bits of the result do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.compression.families import SCORES, routing_groups
from engine.compression.layers import ModuleMixture, as_tensors, group_layer, merge_group, router_rows
from engine.compression.model import CompressedModel, layer_file
from engine.correction.files import save_tensors
from engine.correction.partial_model import PartialModel
from engine.errors import CheckpointError
from engine.models.blocks import ModelPart, SampleState
from engine.planning.open_models import load_base_config
from engine.planning.plan import Plan
from engine.storage.folder import Folder


class Compressor:
    """The samples in the model, and in the smaller model if its statistics are taken there.

    Args:
        plan: The plan.
        given: The arguments of a forward pass over each sample.
        state: The folder of the run's state.
        device: The device of the forward passes.
    """

    def __init__(self, plan: Plan, given: Sequence[Mapping[str, Any]], state: Folder, device: torch.device) -> None:
        self.compressed, self._state, self._count = CompressedModel(plan, state), state, len(given)
        base = self.compressed.base
        self._model = PartialModel(plan, load_base_config(plan), base.folder, base.folder, base.read, given, device)
        self._stream = self._model
        if self.compressed.settings.in_sequence:
            smaller, config = self.compressed.smaller, self.compressed.config()
            read = self.compressed.read
            self._stream = PartialModel(smaller, config, base.folder, base.folder, read, given, device)
        # The part that the stream is before, and its states after it, if these are known.
        self._at, self._ahead = 0, list[SampleState]()

    @property
    def parts(self) -> int:
        """The number of parts of the model."""
        return len(self._model.run.parts)

    def compress(self, number: int) -> None:
        """Compress the layer of experts of part `number`, if it has one, and store it. All parts before have been.

        Raises:
            CheckpointError: The layer's weights, inputs or outputs are not finite, or the model does not run block by
                block.
        """
        part = self._model.run.parts[number]
        layer = None if part.block is None else self.compressed.layout.layer_of(part.name)
        if layer is None or self.compressed.is_stored(layer):
            return
        while self._at < number:
            self._advance()
        self._model.load(part)
        module = self._model.model.get_submodule(layer)
        if not all(bool(weight.isfinite().all()) for weight in (*module.parameters(), *module.buffers())):
            raise CheckpointError(f"weights of {layer!r} are not finite", str(self._model.model.name_or_path))
        inputs = self._inputs(part, layer)
        try:
            tensors = self._compressed(ModuleMixture(module, self._scores), inputs, layer)
        except FloatingPointError as error:
            what = f"outputs of the router or the experts of {layer!r} are not finite on the calibration samples"
            raise CheckpointError(what, str(self._model.model.name_or_path)) from error
        self._model.drop(part)
        save_tensors(self._state, layer_file(self.compressed.layout.layers.index(layer)), tensors)

    @property
    def _scores(self) -> str:
        return SCORES[self.compressed.layout.header.config["model_type"]]

    def _compressed(self, mixture: ModuleMixture, inputs: Sequence[Tensor], layer: str) -> dict[str, Tensor]:
        """Return what is stored of a layer."""
        compressed, settings = self.compressed, self.compressed.settings
        header, read = compressed.layout.header, compressed.base.read
        found = group_layer(mixture, inputs, settings, compressed.kept, routing_groups(header))
        tensors, dtype = as_tensors(found), compressed.dtype(layer)
        for index, (group, shares) in enumerate(zip(found.groups, found.shares, strict=True)):
            if len(group) > 1:
                one = merge_group(
                    mixture,
                    inputs,
                    settings,
                    lambda expert: compressed.layout.expert(read, layer, expert),
                    group,
                    shares,
                )
                for name in ("gate", "up", "down"):
                    tensors[f"{index}.{name}"] = getattr(one, name).to(dtype)
        for name, stored in compressed.layout.router(read, layer).items():
            tensors[name] = router_rows(stored, found, settings.method)
        return tensors

    def _inputs(self, part: ModelPart, layer: str) -> list[Tensor]:
        """Run the samples through a block, and return the inputs of its router, [T, H] of each sample."""
        found: list[Tensor] = []
        router = {f"{layer}.gate": self._model.model.get_submodule(f"{layer}.gate")}
        ahead = []
        for place in range(self._count):
            if self._stream is not self._model:
                self._model.run.states[place] = self._stream.run.before(part, place)
            ahead.append(
                self._model.run.forward(
                    part, place, router, lambda _, x: found.append(x.reshape(-1, x.shape[-1]).cpu().clone())
                )
            )
        if self._stream is self._model:
            self._ahead = ahead
        if not all(bool(x_TH.isfinite().all()) for x_TH in found):
            raise CheckpointError(
                f"the inputs of {layer!r} are not finite on the calibration samples",
                str(self._model.model.name_or_path),
            )
        return found

    def _advance(self) -> None:
        """Run the samples through the part that the stream is before."""
        part = self._stream.run.parts[self._at]
        if self._ahead:
            self._stream.run.states = self._ahead
        else:
            self._stream.load(part)
            self._stream.run.step(part)
            self._stream.drop(part)
        self._ahead = []
        self._at += 1
