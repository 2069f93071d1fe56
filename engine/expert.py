"""A frozen expert: calibration sample in, target out. One forward pass a sample, and nothing is kept.

Letters in tensor names: B batch (1), T tokens, H hidden features, V vocabulary. Knows nothing of merging.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import safetensors.torch
import torch
from torch import Tensor

from engine.calibration import Sample
from engine.checkpoint import Checkpoint, Expert, FullExpert, open_base, open_expert
from engine.devices import device_map, device_of
from engine.errors import CheckpointError
from engine.model import (
    build_skeleton,
    computes_alike,
    fill,
    head_names,
    load_generation_config,
    load_model_config,
    rebuild_logits,
)
from engine.plan import Plan
from engine.storage import Folder
from engine.task_vectors import blocks


@dataclass(frozen=True)
class Target:
    """What an expert says to one sample, in the run's dtype: hₖ,ₗ(x) for ℓ ∈ S, and zₖ(x) or what gives it.

    `input_ids_T` int64 are the tokens, any response that the expert wrote included. Either `logits_TV` is there, or
    `last_hidden_TH`, from which the base's output head makes the same logits; or neither, where no expert was asked.
    """

    input_ids_T: Tensor
    hidden_TH: dict[int, Tensor] = field(default_factory=dict)
    last_hidden_TH: Tensor | None = None
    logits_TV: Tensor | None = None

    @classmethod
    def unlabelled(cls, input_ids_T: Tensor) -> Target:
        """The tokens of a sample alone, for a method that asks no expert."""
        return cls(input_ids_T)

    @property
    def labelled(self) -> bool:
        """Whether an expert said something to the sample."""
        return self.last_hidden_TH is not None or self.logits_TV is not None

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it travels and is stored."""
        named = {"input_ids": self.input_ids_T, "last_hidden": self.last_hidden_TH, "logits": self.logits_TV}
        named |= {f"hidden.{index}": tensor for index, tensor in self.hidden_TH.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Target:
        """The inverse of `tensors`."""
        hidden = {int(name[7:]): tensor for name, tensor in tensors.items() if name.startswith("hidden.")}
        return cls(tensors["input_ids"], hidden, tensors.get("last_hidden"), tensors.get("logits"))


def check_models(plan: Plan) -> None:
    """Whether transformers takes the base and every expert that runs forward; reads no weight.

    Raises:
        CheckpointError: see `build_skeleton`.
    """
    base, dtype, code = open_base(plan).folder, getattr(torch, plan.dtype), plan.config.trust_remote_code
    build_skeleton(base, plan.base_header.tensors, dtype, code)
    load_generation_config(base)
    own = load_model_config(base, code)
    for expert in plan.experts if plan.config.labelled else ():
        source = open_expert(expert)
        if isinstance(source, FullExpert):
            folder = source.checkpoint.folder
            load_generation_config(folder)
            if not computes_alike(own, load_model_config(folder, code)):
                build_skeleton(folder, plan.base_header.tensors, dtype, code)


class FrozenExpert:
    """Expert `index` of the plan with its weights on a device; its merged form is never made of any other model."""

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        expert, base = plan.experts[index], open_base(plan)
        self.plan, self.device, self.dtype = plan, device, getattr(torch, plan.dtype)
        folder = base.folder
        source = open_expert(expert)
        if isinstance(source, FullExpert):
            folder = source.checkpoint.folder
        code = plan.config.trust_remote_code
        self.model, partners = build_skeleton(folder, plan.base_header.tensors, self.dtype, code)
        devices = device_map(self.model, self.dtype, device)
        tensors = {}
        for name, partner in partners.items():
            device, weight = device_of(partner, devices), _weight(base, source, name)
            tensors[partner] = weight.to(device, self.dtype) if weight.is_floating_point() else weight.to(device)
        fill(self.model, tensors, devices)
        self.model.generation_config = load_generation_config(folder) or self.model.generation_config
        # An expert may have been fine-tuned with another configuration; then the base's head does not give its logits.
        alike = computes_alike(load_model_config(base.folder, code), load_model_config(folder, code))
        self._base_gives_logits = alike and self._head_is_the_base_s(base, partners)

    def _head_is_the_base_s(self, base: Checkpoint, partners: dict[str, str]) -> bool:
        """Whether the trainer's head is bit for bit this expert's: equal to the base's, and not merged."""
        files = {partner: name for name, partner in partners.items()}
        heads = [files[name] for name in head_names(self.model)]
        state = self.model.state_dict()
        return not any(name in self.plan.merged_set for name in heads) and all(
            torch.equal(state[partners[name]].cpu(), base.read(name).to(self.dtype)) for name in heads
        )

    @torch.no_grad()
    def target(self, sample: Sample) -> Target:
        """Run forward once on one sample (with the response that the expert writes first, where that is asked for).

        Raises:
            CheckpointError: the expert's hidden states or logits are not finite.
        """
        ids_BT = torch.tensor([sample.input_ids], device=self.device)
        if sample.generate:
            options = {"max_new_tokens": sample.generate, "do_sample": False}
            ids_BT = self.model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        output = self.model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), output_hidden_states=True, use_cache=False
        )
        if not output.logits.isfinite().all():
            raise CheckpointError("the expert's logits are not finite on a calibration sample", sample.where)
        last_BTH = output.hidden_states[-1]
        # Asked for and checked: what lies between the last hidden state and the logits is the model's affair.
        rebuilt = self._base_gives_logits and torch.equal(rebuild_logits(self.model, last_BTH), output.logits)
        return Target(
            input_ids_T=ids_BT[0].cpu(),
            hidden_TH={index: output.hidden_states[index][0].cpu() for index in self.plan.hidden_layers},
            last_hidden_TH=last_BTH[0].cpu() if rebuilt else None,
            logits_TV=None if rebuilt else output.logits[0].cpu(),
        )


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
