"""Mapping from the tensor names in files to the parameters and buffers of a module.

Most tensors of a file are a parameter of the module, possibly under another name. In a mixture of experts (Qwen3-MoE,
Mixtral), each expert has tensors of its own in the files, which are parts of one parameter in the module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from engine.checkpoints.headers import TensorHeader
from engine.checkpoints.structure import BUFFERS, Place, Role, Structure, without_wrappers
from engine.errors import CheckpointError
from engine.models.forward import decoders, language_model

Places = Mapping[str, Place]


class _Names:
    """The way from a file's names to those of a module, as transformers goes it."""

    def __init__(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state = model.state_dict()
        self.buffers = {name for name, _ in model.named_buffers()}
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), BUFFERS.pattern]
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def find(self, name: str) -> tuple[str, str | None, bool]:
        """Return the module's name for a file's tensor, the pattern of its converter, and whether a wrapper was cut."""
        plain = without_wrappers(name)
        for one in dict.fromkeys((name, plain)):
            renamed, pattern = rename_source_key(one, self._renamings, self._converters, self._prefix, self.state)
            if renamed in self.state:
                return renamed, pattern, one != name
        return renamed, None, plain != name

    def unused(self, renamed: str) -> bool:
        """Return whether the module does not read a tensor of this name from its files."""
        if renamed in self.state:
            return False
        return renamed in self.buffers or any(pattern.search(renamed) for pattern in self._ignored)

    def start(self, tensor: TensorHeader, renamed: str, pattern: str | None, folder: Path) -> int:
        """Return the first element of a file's tensor in its flattened parameter.

        Raises:
            CheckpointError: The tensor is not a contiguous part of the parameter.
        """
        if pattern is None:
            return 0
        converter = next(converter for converter in self._converters if pattern in converter.source_patterns)
        return _part(tensor, converter, pattern, tuple(self.state[renamed].shape), folder)


def match_names(model: Any, tensors: Mapping[str, TensorHeader], folder: Path) -> Places:
    """Return the place of each tensor in the module, by its name in the files.

    Renamings and fusions are those of transformers' conversion mapping for the architecture. Tensors that the
    architecture ignores are left out.

    Raises:
        CheckpointError: A tensor matches no parameter, has another shape than its parameter, or is not a contiguous
            part of it.
    """
    names, places = _Names(model), {}
    for name, tensor in tensors.items():
        renamed, pattern, _ = names.find(name)
        if names.unused(renamed):
            continue
        if renamed not in names.state:
            raise CheckpointError(
                f"the tensor {name!r} matches no parameter of the model",
                str(folder),
                f"a parameter of {type(model).__name__}",
                "if the model works without it, load the model with transformers and save it with `save_pretrained`, "
                "which leaves it out",
            )
        whole = tuple(names.state[renamed].shape)
        start = names.start(tensor, renamed, pattern, folder)
        if pattern is None and tensor.shape != whole:
            raise CheckpointError(f"{name!r} has shape {tensor.shape}", str(folder), f"{whole}, from config.json")
        places[name] = Place(renamed, start)
    return places


def structure_of(model: Any, tensors: Mapping[str, TensorHeader], folder: Path) -> Structure:
    """Return what the tensors of a model's files are in the module, without a check of their shapes."""
    names, of_parameters = _Names(model), parameter_roles(model)
    places, roles = {}, {}
    unused, wrapped, unknown = set(), set(), set()
    for name, tensor in tensors.items():
        renamed, pattern, cut = names.find(name)
        known = renamed in names.state
        places[name] = Place(name)
        if known:
            # Tensors that are no contiguous part of a parameter keep a place of their own name.
            with suppress(CheckpointError):
                places[name] = Place(renamed, names.start(tensor, renamed, pattern, folder))
        if names.unused(renamed):
            unused.add(name)
            roles[name] = Role.BUFFER
        elif not known:
            unknown.add(name)
        elif renamed in of_parameters:
            roles[name] = of_parameters[renamed]
        if known and cut:
            wrapped.add(name)
    return Structure(places, roles, frozenset(unused), frozenset(wrapped), frozenset(unknown))


def parameter_finder(model: Any) -> Callable[[str], str | None]:
    """Return a function from a parameter's name in a file or an adapter to the module's name of the whole parameter.

    The function returns None for a name of no parameter, and for one of a part of a parameter.
    """
    names = _Names(model)

    def find(name: str) -> str | None:
        renamed, pattern, _ = names.find(name)
        return renamed if renamed in names.state and pattern is None else None

    return find


def parameter_roles(model: Any) -> dict[str, Role]:
    """Return the roles of a module's parameters and buffers, by the kinds of modules that own them."""
    embedding = set(model.get_input_embeddings().modules())
    heads = (one.get_output_embeddings() for one in model.modules() if isinstance(one, PreTrainedModel))
    head = {module for one in heads if one is not None for module in one.modules()}
    roles: dict[str, Role] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if module in head:
            role = Role.HEAD
        elif module in embedding:
            role = Role.EMBEDDING
        elif isinstance(module, torch.nn.Embedding):
            role = Role.POSITION
        elif "norm" in type(module).__name__.lower():
            role = Role.NORM
        else:
            continue
        roles |= {f"{prefix}.{name}": role for name, _ in module.named_parameters(recurse=False)}
    return roles | {name: Role.BUFFER for name, _ in model.named_buffers()}


def positions_of(model: Any) -> int | None:
    """Return the number of positions of a model that keeps a table of them, beyond which its forward pass fails.

    None if it computes positions for any length, as with rotary embeddings, or has none.
    """
    language = language_model(model)
    config = language.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if type(most) is not int or getattr(config, "rope_parameters", None):
        return None
    roles, tensors = parameter_roles(language), {**dict(language.named_parameters()), **dict(language.named_buffers())}
    # The buffers are those of GPT-J and CodeGen. Some tables have a few rows more; others are of kinds of tokens.
    tables = [
        tensor
        for name, tensor in tensors.items()
        if roles.get(name) is Role.POSITION or name.endswith("embed_positions")
    ]
    return most if any(0 < most <= tensor.shape[0] for tensor in tables) else None


def text_parameters(text: Any, model: Any) -> dict[str, str]:
    """Return the names that a text model's parameters have in a model whose language model it is."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    pairs = (
        (decoders(text)[0], model.get_decoder()),
        (text.get_output_embeddings(), language_model(model).get_output_embeddings()),
    )
    inside = {}
    for own, theirs in pairs:
        before = next(name for name, module in text.named_modules() if module is own)
        for name, _ in own.named_parameters(remove_duplicate=False):
            inside[f"{before}.{name}"] = f"{names[id(theirs)]}.{name}"
    return inside


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
