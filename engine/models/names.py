"""Names in files and names in modules: the one place where they meet.

Most tensors of a file are a parameter of the module under the same or another name. The experts of a mixture
(Qwen3-MoE, Mixtral) have a tensor each in files and are parts of one parameter in the module. Knows no weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from engine.checkpoints.headers import TensorHeader
from engine.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file is in the module: a parameter or buffer, from its element `start` on."""

    parameter: str
    start: int = 0


Places = dict[str, Place]


def match_names(model: Any, tensors: Mapping[str, TensorHeader], folder: Path) -> Places:
    """File tensor name → its place in the module. Tensors that the architecture is known to ignore are left out.

    transformers keeps the table of renamings and fusions an architecture went through; nothing else here asks it.

    Raises:
        CheckpointError: a tensor without a partner, of another shape, or one that the module holds in a form of which
        it is no contiguous part.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    places = {}
    for name, tensor in tensors.items():
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed in state:
            whole = tuple(state[renamed].shape)
            start = 0
            if pattern is not None:
                converter = next(one for one in converters if pattern in one.source_patterns)
                start = _part(tensor, converter, pattern, whole, folder)
            elif tensor.shape != whole:
                wanted = f"{whole}, as config.json says"
                raise CheckpointError(f"{name!r} has shape {tensor.shape}", str(folder), wanted)
            places[name] = Place(renamed, start)
        elif not any(re.search(pattern, renamed) for pattern in ignored):
            raise CheckpointError(
                f"the tensor {name!r} has no partner in the model",
                str(folder),
                f"a parameter of {type(model).__name__}",
            )
    return places


def check_filled(model: Any, places: Places, tensors: Mapping[str, TensorHeader], folder: Path) -> None:
    """Whether the tensors of the files are all that the module needs.

    Raises:
        CheckpointError: a parameter without a tensor, or one of whose parts some are missing.
    """
    filled: dict[str, int] = defaultdict(int)
    for name, place in places.items():
        filled[place.parameter] += tensors[name].numel
    tied = set(tied_weights(model))
    for name, parameter in model.named_parameters():
        if name not in tied and (name not in filled or filled[name] != parameter.numel()):
            parts = f"; those of {filled[name]} of {parameter.numel()} elements are there" if name in filled else ""
            raise CheckpointError(f"no tensor in its files fills the model's parameter {name!r}{parts}", str(folder))


def tied_weights(model: Any) -> Mapping[str, str]:
    """The module's names that stand for another's memory, and whose. Code from before transformers 5 does not say."""
    names: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return names


def _part(tensor: TensorHeader, converter: WeightConverter, pattern: str, whole: tuple[int, ...], folder: Path) -> int:
    """The element of a fused parameter from which a tensor of a file is in it.

    A parameter of experts is [experts, rows of all projections, columns]: so each projection of an expert is
    contiguous, in the order in which the converter names them.
    """
    kinds = [type(operation) for operation in converter.operations]
    dims = [operation.dim for operation in converter.operations if hasattr(operation, "dim")]
    _, star, right = pattern.partition("*")
    number = re.search(rf"\.(\d+){re.escape(right)}$", tensor.name) if star else None
    stacked = (kinds, dims) in (([MergeModulelist], [0]), ([MergeModulelist, Concatenate], [0, 1]))
    sources = converter.source_patterns
    if not stacked or number is None or len(whole) != 3 or whole[1] % len(sources):
        raise CheckpointError(
            f"the tensor {tensor.name!r} is stored in another form than the module's {converter.target_patterns[0]!r}",
            str(folder),
            "a tensor that is a parameter of the module, or one expert's projection",
        )
    expert, rows = int(number[1]), whole[1] // len(sources)
    if tensor.shape != (rows, whole[2]) or expert >= whole[0]:
        wanted = f"{(rows, whole[2])} for each of {whole[0]} experts, as config.json says"
        raise CheckpointError(f"{tensor.name!r} has shape {tensor.shape}", str(folder), wanted)
    first = expert * whole[1] + int(sources.index(pattern)) * rows
    return first * whole[2]
