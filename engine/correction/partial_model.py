"""A model in which only what one part needs has weights: what is outside its blocks, and a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from engine.checkpoints.structure import Role
from engine.correction.files import SolvedLayer
from engine.correction.rules import Rule
from engine.models.blocks import BlockRun, ModelPart
from engine.models.internvl import set_image_token
from engine.models.names import parameter_roles
from engine.models.skeleton import build_skeleton, set_weights
from engine.planning.plan import Plan

Read = Callable[[str], Tensor]


class PartialModel:
    """A model and a run of samples through it.

    Args:
        plan: The plan, whose output has the model's tensors.
        config: The model's config.
        folder: The folder of its config, for messages.
        tokenizer_folder: See `load_weights`.
        read: Returns a tensor of the model by its name in the output; it is called anew for each part.
        samples: See `BlockRun`.
        device: The device of the model.
    """

    def __init__(
        self,
        plan: Plan,
        config: Any,
        folder: Path,
        tokenizer_folder: Path,
        read: Read,
        samples: Sequence[Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        self._read, self._device, self._dtype = read, device, getattr(torch, plan.dtype)
        tensors = plan.base_header.tensors
        self.model, self._places = build_skeleton(config, tensors, self._dtype, folder)
        self.run = BlockRun(self.model, samples, device)
        # Parameters that are one tensor in the files, which can be solved.
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        self._tensors = {
            place.parameter: name
            for name, place in self._places.items()
            if sizes.get(place.parameter) == tensors[name].numel and name in plan.merged_set
        }
        self._blocks = tuple(f"{part.name}." for part in self.run.parts if part.block is not None)
        self._roles = parameter_roles(self.model)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
        self._fill(
            parameter
            for parameter in {place.parameter for place in self._places.values()}
            # No part runs a head. One that is tied to an embedding has the embedding's place.
            if not parameter.startswith(self._blocks) and self._roles.get(parameter) is not Role.HEAD
        )
        set_image_token(self.model, tokenizer_folder)

    def load(self, part: ModelPart) -> None:
        """Give weights to what a part runs: a block, or all blocks of the towers before. They are read anew."""
        self._fill(self._inside(part))

    def drop(self, part: ModelPart) -> None:
        """Free the weights that `load` read for a part."""
        state = self.model.state_dict()
        empty = {name: torch.empty_like(state[name], device="meta") for name in self._inside(part)}
        self.model.load_state_dict(empty, strict=False, assign=True)

    def modules(self, part: ModelPart, rule: Rule) -> tuple[dict[str, Any], dict[str, SolvedLayer]]:
        """Return the linear layers and norms of a part that can be solved, as modules and as data, by name.

        Experts of a mixture are not among them: each sees other tokens in the merged model than in an expert. Norms are
        those of blocks, of one input, with a weight per feature.
        """
        mixtures = tuple(
            f"{name}."
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and name.startswith(self._blocks)
        )
        found: dict[str, Any] = {
            name: module for name, module in self.run.linears(part).items() if not name.startswith(mixtures)
        }
        if part.block is None and rule.own_blocks:
            return {}, {}
        if part.block is not None and rule.with_norms:
            prefix = f"{part.name}."
            found |= {
                name: module
                for name, module in self.model.named_modules()
                if name.startswith(prefix) and is_norm(module)
            }
        layers = {}
        for name, module in found.items():
            weight = self._tensors.get(f"{name}.weight")
            bias = self._tensors.get(f"{name}.bias") if rule.with_norms else None
            if weight is not None:
                layers[name] = SolvedLayer(name, weight, bias, isinstance(module, Conv1D))
        return {name: found[name] for name in layers}, layers

    def _inside(self, part: ModelPart) -> list[str]:
        """Return the parameters of a block, or of all blocks of earlier towers."""
        names = tuple(
            f"{one.name}."
            for one in self.run.parts
            if one.block is not None and (one == part if part.block is not None else one.tower < part.tower)
        )
        return sorted({place.parameter for place in self._places.values() if place.parameter.startswith(names)})

    def _fill(self, parameters: Any) -> None:
        wanted = set(parameters)
        places = {name: place for name, place in self._places.items() if place.parameter in wanted}
        set_weights(self.model, places, {"": self._device}, self._dtype, self._read)
        self.model.requires_grad_(False)


def is_norm(module: Any) -> bool:
    """Return whether a module is a norm of one input with a weight per feature."""
    return (
        "norm" in type(module).__name__.lower()
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.dim() == 1
        and len(signature(type(module).forward).parameters) == 2
    )


def normalised(norm: Any, x: Tensor) -> Tensor:
    """Return the input [..., D] of a norm normalised, without its weight and bias.

    The norm is linear in its weight, of which some have 1 + γ in its place.
    """
    ones = torch.ones_like(norm.weight)
    zero = {"weight": ones * 0} | ({} if getattr(norm, "bias", None) is None else {"bias": ones * 0})
    call = torch.func.functional_call
    difference: Tensor = call(norm, zero | {"weight": ones}, (x,)) - call(norm, zero, (x,))
    return difference
