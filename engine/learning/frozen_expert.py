"""A frozen expert, which computes the target of a calibration sample in one forward pass.

Letters in tensor names: B batch (1), T tokens, C tokens that count in the losses, H hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.calibration.samples import Sample
from engine.checkpoints.headers import ModelHeader
from engine.checkpoints.tensors import Checkpoint
from engine.errors import CheckpointError
from engine.learning.targets import Target, loss_index
from engine.models.devices import ONE_DEVICE, Room
from engine.models.forward import arguments, head_names, language_model, rebuild_logits, written
from engine.models.loading import computes_alike, load_config_like, load_generation_config
from engine.models.names import Places
from engine.models.skeleton import build_generation_skeleton, build_skeleton, load_weights, sections
from engine.planning.open_models import base_folder, load_base_config, open_base, open_expert
from engine.planning.plan import ExpertPlan, ModelPlan, Plan
from engine.task_vectors.experts import ExpertWeights, FullExpert
from engine.task_vectors.kinds import Product
from engine.task_vectors.pieces import blocks
from engine.transfers import is_gpu, moved


def check_models(plan: Plan) -> None:
    """Check that transformers can build the base and every expert that runs forward. No weight is read.

    Raises:
        CheckpointError: See `build_skeleton`, `load_model_config`, `load_generation_config` and `language_model`.
    """
    base, dtype = base_folder(plan), getattr(torch, plan.dtype)
    base_config = load_base_config(plan)
    model, _ = build_generation_skeleton(base_config, plan.base_header.tensors, dtype, base)
    language_model(model)
    for expert in plan.experts if plan.config.has_targets else ():
        source = open_expert(expert)
        if isinstance(source, FullExpert):
            folder = source.checkpoint.folder
            load_generation_config(folder)
            config = config_of(plan, expert, base_config, folder)
            if not computes_alike(base_config, config):
                build_skeleton(config, plan.base_header.tensors, dtype, folder)


class FrozenExpert:
    """Expert `index` of the plan, or the base (None), with its weights on a device, and on the other GPUs of `room`.

    Attributes:
        places: The place of each tensor in `model`, by its name in the files.
    """

    def __init__(self, plan: Plan, index: int | None, device: torch.device, room: Room = ONE_DEVICE) -> None:
        expert, base = plan.base if index is None else plan.experts[index], open_base(plan)
        self.plan, self.device, self.dtype = plan, device, getattr(torch, plan.dtype)
        folder = base.folder
        source = open_expert(expert) if isinstance(expert, ExpertPlan) else FullExpert(base, None)
        if isinstance(source, FullExpert):
            folder = source.checkpoint.folder
        base_config = load_base_config(plan)
        config = config_of(plan, expert, base_config, folder)
        # If the expert's config computes something else, the base's head does not give the expert's logits.
        alike = computes_alike(base_config, config)
        self.model, places = build_generation_skeleton(config, plan.base_header.tensors, self.dtype, folder)
        self.places = places
        load_weights(self.model, places, self.dtype, device, base.folder, self._read(base, source), room)
        self._base_gives_logits = alike and self._head_equals_base(base, source, places)

    def _read(self, base: Checkpoint, source: ExpertWeights) -> Callable[[str], Tensor]:
        """Return a function that returns θₖ of a tensor; for a GPU, factors of an adapter are multiplied there."""

        def read(name: str) -> Tensor:
            adapted = is_gpu(self.device) and not isinstance(source, FullExpert)
            task_vector = source.task_vector(name) if adapted else None
            if not isinstance(task_vector, Product):
                return weight_of(base, source, name)
            weight, left, right = (
                moved(tensor, self.device, torch.float32)
                for tensor in (base.read(name), task_vector.left, task_vector.right)
            )
            return torch.addmm(weight, left, right)

        return read

    def _head_equals_base(self, base: Checkpoint, source: ExpertWeights, places: Places) -> bool:
        """Return whether the trainer's head is bit for bit the expert's: equal to the base's, and not merged."""
        heads = set(head_names(self.model))
        names = [name for name, place in places.items() if place.parameter in heads]
        return not any(name in self.plan.merged_set for name in names) and all(
            torch.equal(weight_of(base, source, name).to(self.dtype), base.read(name).to(self.dtype)) for name in names
        )

    @torch.no_grad()
    def given(self, sample: Sample, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the arguments of a forward pass over a sample, with its pixel inputs `inputs`.

        If the sample asks for a response, the expert generates it first.
        """
        inputs = inputs or {}
        ids_BT = torch.tensor([sample.input_ids], device=self.device)
        if sample.generate:
            prompt = arguments(ids_BT, torch.ones_like(ids_BT), inputs)
            ids_BT = torch.cat([ids_BT, written(self.model, prompt, sample.generate)], dim=1)
        return arguments(ids_BT, torch.ones_like(ids_BT), inputs)

    @torch.no_grad()
    def target(self, sample: Sample, inputs: Mapping[str, Tensor] | None = None) -> Target:
        """Compute the target of a sample in one forward pass; see `given`.

        Raises:
            CheckpointError: The expert's logits are not finite, or its hidden states are not one vector per token.
        """
        given = self.given(sample, inputs)
        ids_BT = given["input_ids"]
        output = self.model(**given, output_hidden_states=True, use_cache=False, return_dict=True)
        if not output.logits.isfinite().all():
            raise CheckpointError("the expert's logits are not finite on a calibration sample", sample.where)
        for index in self.plan.hidden_layers:
            if (states := output.hidden_states[index]).dim() != 3:
                raise CheckpointError(
                    f"{type(self.model).__name__} has hidden states of shape {tuple(states.shape)}",
                    "parameters.hidden_layers",
                    "samples, tokens, features",
                    "set `hidden_layers: []`, to compare logits alone",
                )
        last_BTH = output.hidden_states[-1]
        # Compared on each sample, since the model's own code decides how logits follow from the last hidden state.
        rebuilt = self._base_gives_logits and torch.equal(rebuild_logits(self.model, last_BTH), output.logits)
        counted_C = loss_index(sample, ids_BT.shape[1])
        rows = slice(None) if counted_C is None else counted_C
        return Target(
            input_ids_T=ids_BT[0].cpu(),
            hidden_CH={index: output.hidden_states[index][0].cpu()[rows] for index in self.plan.hidden_layers},
            last_hidden_CH=last_BTH[0].cpu()[rows] if rebuilt else None,
            logits_CV=None if rebuilt else output.logits[0].cpu()[rows],
            counted_C=counted_C,
        )


def config_of(plan: Plan, expert: ModelPlan, base_config: Any, folder: Path) -> Any:
    """Return the config with which an expert runs forward: its own, or the base's for a text model in a base of images.

    Such an expert is the base's model with the language model of the expert.
    """
    header = expert.header
    if isinstance(header, ModelHeader) and plan.base_header.takes_images and not header.takes_images:
        return base_config
    config = load_config_like(base_config, folder)
    # The expert's weights stand in the base's tensors here: which there are, and with how many rows, the base decides.
    for ours, theirs in zip(sections(config), sections(base_config), strict=True):
        for key in ("tie_word_embeddings", "vocab_size", "pad_token_id"):
            if hasattr(theirs, key):
                setattr(ours, key, getattr(theirs, key))
    return config


def weight_of(base: Checkpoint, source: ExpertWeights, name: str) -> Tensor:
    """Return θₖ of one tensor: the stored one for a full checkpoint, θ₀ + τₖ in float32 where an adapter changes it."""
    if isinstance(source, FullExpert):
        stored = source.stored(name)
        return base.read(name) if stored is None else _with_rows(stored, base.read(name))
    weight, task_vector = base.read(name), source.task_vector(name)
    if task_vector is None:
        return weight
    adapted = weight.to(torch.float32, copy=True)
    for start, stop in blocks(adapted.shape):
        block, tau = adapted.view(-1)[start:stop], torch.empty(stop - start)
        task_vector.block(start, stop, block, tau)
        block.add_(tau)
    return adapted


def _with_rows(stored_N: Tensor, base: Tensor) -> Tensor:
    """Return an expert's tensor in the base's shape; rows that it lacks are the base's, and further rows are cut."""
    if len(stored_N) < base.numel():
        stored_N = torch.cat([stored_N, base.reshape(-1)[len(stored_N) :].to(stored_N.dtype)])
    return stored_N[: base.numel()].view(base.shape)
