"""Targets: the outputs of an expert that the student is aligned with, and their files.

Letters in tensor names: T tokens, C tokens that count in the losses, H hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.calibration.samples import Sample, loss_positions
from engine.errors import DamagedError
from engine.storage.folder import Folder
from engine.storage.sealed import read_sealed, refuse, write_sealed


@dataclass(frozen=True)
class Target:
    """The target of one sample: hidden states hₖ,ₗ(x), ℓ ∈ S, and logits zₖ(x) of its expert, in the run's dtype.

    Attributes:
        input_ids_T: Tokens, int64, including a response that the expert generated.
        hidden_CH: Hidden states by layer index.
        last_hidden_CH: Last hidden state, if the base's output head rebuilds the expert's logits from it.
        logits_CV: Logits otherwise. Both are None for a sample without an expert's outputs (AdaMerging).
        counted_C: Positions, int64, that count in the losses and that the outputs belong to; None: all positions.
        inputs: Pixel inputs of the sample, by argument name of the forward pass.
    """

    input_ids_T: Tensor
    hidden_CH: dict[int, Tensor] = field(default_factory=dict)
    last_hidden_CH: Tensor | None = None
    logits_CV: Tensor | None = None
    counted_C: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_expert(self) -> bool:
        """Whether the target holds an expert's outputs."""
        return self.last_hidden_CH is not None or self.logits_CV is not None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the target by name, as they are sent and stored."""
        named = {
            "input_ids": self.input_ids_T,
            "last_hidden": self.last_hidden_CH,
            "logits": self.logits_CV,
            "counted": self.counted_C,
        }
        named |= {f"hidden.{index}": tensor for index, tensor in self.hidden_CH.items()}
        named |= {f"inputs.{name}": tensor for name, tensor in self.inputs.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def is_plausible(self, vocabulary: int | None = None) -> bool:
        """Return whether dtypes and shapes fit each other, as they do in every target that an expert computed.

        `vocabulary`: the number of token ids; None if it is not known.
        """
        ids_T, outputs = self.input_ids_T, [*self.hidden_CH.values(), self.last_hidden_CH, self.logits_CV]
        counted = len(ids_T) if self.counted_C is None else len(self.counted_C)
        places = [tensor for tensor in (ids_T, self.counted_C) if tensor is not None]
        return bool(
            all(place.dim() == 1 and place.dtype == torch.int64 and (place >= 0).all() for place in places)
            and (vocabulary is None or bool((ids_T < vocabulary).all()))
            and (self.counted_C is None or bool((self.counted_C < len(ids_T)).all()))
            and all(
                output.dim() == 2 and len(output) == counted and output.is_floating_point()
                for output in outputs
                if output is not None
            )
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Target:
        """Build a target from the tensors that `tensors` returned."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        return cls(
            tensors["input_ids"],
            {int(index): tensor for index, tensor in under("hidden.").items()},
            tensors.get("last_hidden"),
            tensors.get("logits"),
            tensors.get("counted"),
            under("inputs."),
        )


def without_targets(sample: Sample, inputs: Mapping[str, Tensor] | None = None) -> Target:
    """Return a target that holds a sample's tokens and pixel inputs but no outputs of an expert."""
    ids_T = torch.tensor(sample.input_ids)
    return Target(ids_T, counted_C=loss_index(sample, len(ids_T)), inputs=inputs or {})


def loss_index(sample: Sample, length: int) -> Tensor | None:
    """Return the positions [C], int64, that count in a sample's losses; None if all do."""
    places = loss_positions(sample.masked_spans, length)
    return None if places is None else torch.tensor(places)


def save_target(target: Target, folder: Folder, name: str) -> int:
    """Write a target to a sealed file and return the size of the file in bytes."""
    # Cloned: the last hidden state may be a layer of S too, and safetensors refuses two names for one memory.
    data = safetensors.torch.save({name: tensor.clone() for name, tensor in target.tensors().items()})
    return write_sealed(folder, name, data)


def load_target(folder: Folder, name: str, vocabulary: int | None = None) -> Target:
    """Read a target from its file. `vocabulary`: the number of token ids that the model has; None if it is not known.

    Raises:
        DamagedError: the file is damaged, or its tensors are not those of a target for this vocabulary.
    """
    where, content = f"{folder.where}/{name}", read_sealed(folder, name)
    try:
        target = Target.from_tensors(safetensors.torch.load(content))
    except (SafetensorError, ValueError, KeyError):
        refuse(where)
    if not target.is_plausible(vocabulary):
        refuse(where)
    return target


def load_tensors(folder: Folder, names: Sequence[str], vocabulary: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of stored files: a target, preceded by the sample's pixel inputs if it has any.

    Raises:
        DamagedError: see `load_target`.
    """
    files = [load_target(folder, name, vocabulary).tensors() for name in names]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def is_damaged(folder: Folder, name: str, vocabulary: int | None = None) -> bool:
    """Return whether a file is missing, damaged or no target; for the arguments see `load_target`."""
    try:
        load_target(folder, name, vocabulary)
    except (FileNotFoundError, DamagedError):
        return True
    return False
