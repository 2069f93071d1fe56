"""A frozen expert: calibration sample in, target out. One forward pass a sample, and nothing is kept.

Letters in tensor names: B batch (1), T tokens, C those whose losses count, H hidden features, V vocabulary. Knows no
merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engine import internvl_chat
from engine.calibration import Sample, counted
from engine.checkpoint import Checkpoint, Expert, FullExpert, open_base, open_expert
from engine.devices import device_map
from engine.errors import CheckpointError
from engine.model import (
    arguments,
    build_skeleton,
    computes_alike,
    fill,
    head_names,
    load_config_like,
    load_generation_config,
    load_model_config,
    rebuild_logits,
    speaker,
)
from engine.names import Places
from engine.plan import Plan
from engine.storage import Folder
from engine.task_vectors import blocks


@dataclass(frozen=True)
class Target:
    """What an expert says to one sample, in the run's dtype: hₖ,ₗ(x) for ℓ ∈ S, and zₖ(x) or what gives it.

    `input_ids_T` int64 are the tokens, any response that the expert wrote included; `inputs` are the tensors that a
    forward pass takes beside them. Either `logits_CV` is there, or `last_hidden_CH`, from which the base's output head
    makes the same logits; or neither, where no expert was asked. `counted_C` are the positions that they are of; None:
    of all.
    """

    input_ids_T: Tensor
    hidden_CH: dict[int, Tensor] = field(default_factory=dict)
    last_hidden_CH: Tensor | None = None
    logits_CV: Tensor | None = None
    counted_C: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether an expert said something to the sample."""
        return self.last_hidden_CH is not None or self.logits_CV is not None

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it travels and is stored."""
        named = {
            "input_ids": self.input_ids_T,
            "last_hidden": self.last_hidden_CH,
            "logits": self.logits_CV,
            "counted": self.counted_C,
        }
        named |= {f"hidden.{index}": tensor for index, tensor in self.hidden_CH.items()}
        named |= {f"inputs.{name}": tensor for name, tensor in self.inputs.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Target:
        """The inverse of `tensors`."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}

        return cls(
            tensors["input_ids"],
            {int(index): tensor for index, tensor in under("hidden.").items()},
            tensors.get("last_hidden"),
            tensors.get("logits"),
            tensors.get("counted"),
            under("inputs."),
        )


def unlabelled(sample: Sample, inputs: Mapping[str, Tensor] | None = None) -> Target:
    """A sample as the student takes it where no expert is asked; and what an expert takes."""
    ids_T = torch.tensor(sample.input_ids)
    return Target(ids_T, counted_C=_counted(sample, len(ids_T)), inputs=inputs or {})


def _counted(sample: Sample, length: int) -> Tensor | None:
    places = counted(sample.uncounted, length)
    return None if places is None else torch.tensor(places)


def check_models(plan: Plan) -> None:
    """Whether transformers takes the base and every expert that runs forward; reads no weight.

    Raises:
        CheckpointError: see `build_skeleton`.
    """
    base, dtype = open_base(plan).folder, getattr(torch, plan.dtype)
    own = load_model_config(base, plan.config.trust_remote_code)
    build_skeleton(own, plan.base_header.tensors, dtype, base)
    load_generation_config(base)
    for expert in plan.experts if plan.config.labelled else ():
        source = open_expert(expert)
        if isinstance(source, FullExpert):
            folder = source.checkpoint.folder
            load_generation_config(folder)
            config = load_config_like(own, folder)
            if not computes_alike(own, config):
                build_skeleton(config, plan.base_header.tensors, dtype, folder)


class FrozenExpert:
    """Expert `index` of the plan with its weights on a device; its merged form is never made of any other model."""

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        expert, base = plan.experts[index], open_base(plan)
        self.plan, self.device, self.dtype = plan, device, getattr(torch, plan.dtype)
        folder = base.folder
        source = open_expert(expert)
        if isinstance(source, FullExpert):
            folder = source.checkpoint.folder
        own = load_model_config(base.folder, plan.config.trust_remote_code)
        config = load_config_like(own, folder)
        # An expert may have been fine-tuned with another configuration; then the base's head does not give its logits.
        alike = computes_alike(own, config)
        self.model, places = build_skeleton(config, plan.base_header.tensors, self.dtype, folder)

        def weight(name: str) -> Tensor:
            tensor = _weight(base, source, name)
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

        fill(self.model, places, device_map(self.model, self.dtype, device), self.dtype, weight)
        internvl_chat.tell_context(self.model, base.folder)
        if (generation := load_generation_config(folder)) is not None:
            speaker(self.model).generation_config = generation
        self._base_gives_logits = alike and self._head_is_the_base_s(base, source, places)

    def _head_is_the_base_s(self, base: Checkpoint, source: Expert, places: Places) -> bool:
        """Whether the trainer's head is bit for bit this expert's: equal to the base's, and not merged."""
        heads = set(head_names(self.model))
        names = [name for name, place in places.items() if place.parameter in heads]
        return not any(name in self.plan.merged_set for name in names) and all(
            torch.equal(_weight(base, source, name).to(self.dtype), base.read(name).to(self.dtype)) for name in names
        )

    @torch.no_grad()
    def target(self, sample: Sample, inputs: Mapping[str, Tensor] | None = None) -> Target:
        """Run forward once on one sample (with the response that the expert writes first, where that is asked for).

        `inputs` are what the sample has beside its tokens.

        Raises:
            CheckpointError: the expert's hidden states or logits are not finite.
        """
        inputs = inputs or {}
        ids_BT = torch.tensor([sample.input_ids], device=self.device)
        if sample.generate:
            prompt = arguments(ids_BT, torch.ones_like(ids_BT), inputs)
            ids_BT = torch.cat([ids_BT, written(self.model, prompt, sample.generate)], dim=1)
        given = arguments(ids_BT, torch.ones_like(ids_BT), inputs)
        output = self.model(**given, output_hidden_states=True, use_cache=False, return_dict=True)
        if not output.logits.isfinite().all():
            raise CheckpointError("the expert's logits are not finite on a calibration sample", sample.where)
        last_BTH = output.hidden_states[-1]
        # Asked for and checked: what lies between the last hidden state and the logits is the model's affair.
        rebuilt = self._base_gives_logits and torch.equal(rebuild_logits(self.model, last_BTH), output.logits)
        counted_C = _counted(sample, ids_BT.shape[1])
        rows = slice(None) if counted_C is None else counted_C
        return Target(
            input_ids_T=ids_BT[0].cpu(),
            hidden_CH={index: output.hidden_states[index][0].cpu()[rows] for index in self.plan.hidden_layers},
            last_hidden_CH=last_BTH[0].cpu()[rows] if rebuilt else None,
            logits_CV=None if rebuilt else output.logits[0].cpu()[rows],
            counted_C=counted_C,
        )


def written(model: Any, given: Mapping[str, Any], count: int) -> Tensor:
    """What a model writes behind its prompts, at most `count` tokens [B, T], the likeliest one by one.

    `given` is what its forward pass takes; shorter prompts are filled up at their beginning.
    """
    ids_BT: Tensor = given["input_ids"]
    if internvl_chat.is_original(model.config):
        given = internvl_chat.for_generation(given)
    written_BT: Tensor = model.generate(**given, max_new_tokens=count, do_sample=False)
    # From embeddings, as InternVL's own code has it, only what is new comes back.
    length = ids_BT.shape[1]
    return written_BT[:, length:] if torch.equal(written_BT[:, :length], ids_BT) else written_BT


def save_target(target: Target, folder: Folder, name: str) -> int:
    """Write a target to a file that appears whole or not at all; returns its bytes."""
    # Copies: the last hidden state may also be one of S, and the format allows no two names for one memory.
    data = safetensors.torch.save({name: tensor.clone() for name, tensor in target.tensors().items()})
    folder.write(name, data)
    return len(data)


def load_target(folder: Folder, name: str) -> Target:
    """A target from its file."""
    return Target.from_tensors(safetensors.torch.load(folder.read(name)))


def _weight(base: Checkpoint, source: Expert, name: str) -> Tensor:
    """θₖ of one tensor: as the expert's files have it, or θ₀ + τₖ in float32 where an adapter changes it."""
    if isinstance(source, FullExpert):
        return source.checkpoint.read(name)
    weight, task_vector = base.read(name), source.task_vector(name)
    if task_vector is None:
        return weight
    adapted = weight.to(torch.float32, copy=True)
    for start, stop in blocks(adapted.shape):
        block, tau = adapted.view(-1)[start:stop], torch.empty(stop - start)
        task_vector.block(start, stop, block, tau)
        block.add_(tau)
    return adapted
