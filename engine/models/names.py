"""Mapping from the tensor names in files to the parameters and buffers of a module.

Most tensors of a file are a parameter of the module, possibly under another name. In a mixture of experts (Qwen3-MoE,
Mixtral), each expert has tensors of its own in the files, which are parts of one parameter in the module.
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
    """Position of a file's tensor in a module: a parameter or buffer, and the first element of the tensor in it."""

    parameter: str
    start: int = 0


Places = dict[str, Place]


def match_names(model: Any, tensors: Mapping[str, TensorHeader], folder: Path) -> Places:
    """Return the place of each tensor in the module, by its name in the files.

    Renamings and fusions are those of transformers' conversion mapping for the architecture. Tensors that the
    architecture ignores are left out.

    Raises:
        CheckpointError: A tensor matches no parameter, has another shape than its parameter, or is not a contiguous
            part of it.
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
                converter = next(converter for converter in converters if pattern in converter.source_patterns)
                start = _part(tensor, converter, pattern, whole, folder)
            elif tensor.shape != whole:
                wanted = f"{whole}, from config.json"
                raise CheckpointError(f"{name!r} has shape {tensor.shape}", str(folder), wanted)
            places[name] = Place(renamed, start)
        elif not any(re.search(pattern, renamed) for pattern in ignored):
            raise CheckpointError(
                f"the tensor {name!r} matches no parameter of the model",
                str(folder),
                f"a parameter of {type(model).__name__}",
            )
    return places


def check_filled(model: Any, places: Places, tensors: Mapping[str, TensorHeader], folder: Path) -> None:
    """Check that the files' tensors fill every parameter of the module.

    Raises:
        CheckpointError: A parameter has no tensor, or the tensors of its parts have another number of elements.
    """
    filled: dict[str, int] = defaultdict(int)
    for name, place in places.items():
        filled[place.parameter] += tensors[name].numel
    tied = set(tied_weights(model))
    for name, parameter in model.named_parameters():
        if name not in tied and (name not in filled or filled[name] != parameter.numel()):
            held = f"{filled[name]} elements" if name in filled else "no tensor"
            raise CheckpointError(
                f"its files hold {held} for the model's parameter {name!r}",
                str(folder),
                f"{parameter.numel()} elements",
            )


def tied_weights(model: Any) -> Mapping[str, str]:
    """Return the module's tied parameters: name → name of the parameter whose memory it shares.

    Empty for model code written before transformers 5, which lacks the attribute.
    """
    names: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return names


def _part(tensor: TensorHeader, converter: WeightConverter, pattern: str, whole: tuple[int, ...], folder: Path) -> int:
    """Return the index, in a flattened fused parameter, of the first element of a file's tensor.

    The parameter of the experts has the shape [experts, rows of all projections, columns]. A projection of one expert
    is therefore contiguous; projections stand in the order of the converter's source patterns.
    """
    kinds = [type(operation) for operation in converter.operations]
    dims = [operation.dim for operation in converter.operations if hasattr(operation, "dim")]
    _, star, right = pattern.partition("*")
    number = re.search(rf"\.(\d+){re.escape(right)}$", tensor.name) if star else None
    stacked = (kinds, dims) in (([MergeModulelist], [0]), ([MergeModulelist, Concatenate], [0, 1]))
    sources = converter.source_patterns
    if not stacked or number is None or len(whole) != 3 or whole[1] % len(sources):
        raise CheckpointError(
            f"the tensor {tensor.name!r} is not a contiguous part of the module's {converter.target_patterns[0]!r}",
            str(folder),
            "a whole parameter of the module, or a projection of one expert",
        )
    expert, rows = int(number[1]), whole[1] // len(sources)
    if tensor.shape != (rows, whole[2]) or expert >= whole[0]:
        wanted = f"{(rows, whole[2])} for each of {whole[0]} experts, from config.json"
        raise CheckpointError(f"{tensor.name!r} has shape {tensor.shape}", str(folder), wanted)
    first = expert * whole[1] + int(sources.index(pattern)) * rows
    return first * whole[2]
