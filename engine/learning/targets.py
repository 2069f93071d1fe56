"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import safetensors.torch
import torch
from torch import Tensor

from engine.calibration.samples import Sample, loss_positions
from engine.storage.folder import Folder


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
    def has_expert(self) -> bool:
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


def without_targets(sample: Sample, inputs: Mapping[str, Tensor] | None = None) -> Target:
    """A sample as the student takes it where no expert is asked; and what an expert takes."""
    ids_T = torch.tensor(sample.input_ids)
    return Target(ids_T, counted_C=loss_index(sample, len(ids_T)), inputs=inputs or {})


def loss_index(sample: Sample, length: int) -> Tensor | None:
    """Return the positions [C], int64, at which a sample's losses count; None where all do."""
    places = loss_positions(sample.masked_spans, length)
    return None if places is None else torch.tensor(places)


def save_target(target: Target, folder: Folder, name: str) -> int:
    """Write a target to a file that appears whole or not at all; returns its bytes."""
    # Copies: the last hidden state may also be one of S, and the format allows no two names for one memory.
    data = safetensors.torch.save({name: tensor.clone() for name, tensor in target.tensors().items()})
    folder.write(name, data)
    return len(data)


def load_target(folder: Folder, name: str) -> Target:
    """A target from its file."""
    return Target.from_tensors(safetensors.torch.load(folder.read(name)))
