"""The squared gradients in the state of Adam: running means that a training leaves, read without running its code.

A file is safetensors, with one tensor `NAME.exp_avg_sq` per parameter, or a zip archive of `torch.save`, which is
mapped into memory and unpickled with `weights_only`. Its states are by name, by number with `param_names` beside them
(`AdamW(model.named_parameters())`), or by number alone, as the Trainer of transformers saves them.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.untrusted import check_regular, library_errors_as, open_regular, shown

SQUARES = "exp_avg_sq"
Shapes = Mapping[str, tuple[int, ...]]
# Parts that wrappers of a model put into the names of its parameters.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Where a state is in what trainers save around it.
PLACES = ("optimizer", "optimizer_state_dict", "optim")
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
# The first bytes of a zip archive. Older files of `torch.save` are bare pickles, which cannot be mapped into memory.
ZIP = b"PK\x03\x04"
EXPECTED = "the state of Adam or AdamW by `torch.save`, or safetensors with tensors `NAME.exp_avg_sq`"
CONVERT = "save the tensors `exp_avg_sq` from your training, by the names of the parameters, as safetensors"
AGAIN = "load it in a place where you trust it, with `torch.load` or `pickle.load`, and write it by `torch.save` again"


def squared_gradients(file: Path, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Yield name and running mean of the squared gradients, float32, of each parameter that the training changed.

    They are as Adam keeps them, without its correction for the first steps.

    Args:
        file: The file.
        shapes: Shapes of the model's parameters by name, in the order of `named_parameters`, which decides where states
            have numbers alone: first the parameters with several dimensions, then the others, or all in one group.

    Raises:
        CheckpointError: The file is not readable, holds code or no such state, or that of another model.
    """
    check_regular(file, None, CheckpointError, "the state of the optimizer")
    found = _of_safetensors(file) if file.suffix == ".safetensors" else _of_archive(file, shapes)
    found = {_plain(name): tensor for name, tensor in found.items()}
    for name, tensor in found.items():
        if shapes.get(name) != tuple(tensor.shape):
            what = f"the state has a parameter {shown(name)} of shape {tuple(tensor.shape)}"
            expected = f"shape {shapes[name]}" if name in shapes else "the parameters of the model"
            raise CheckpointError(what, str(file), expected)
        squares = tensor.float()
        if not bool((squares >= 0).all() and squares.isfinite().all()):
            raise CheckpointError(
                f"the squared gradients of {shown(name)} have a negative, NaN or infinite value", str(file)
            )
        yield name, squares


def _of_safetensors(file: Path) -> dict[str, Tensor]:
    end = f".{SQUARES}"
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in sorted(opened.keys()) if name.endswith(end)]
            found = {name.removesuffix(end): _dense(name, opened.get_tensor(name), file) for name in names}
    except SafetensorError as error:
        raise CheckpointError("not a valid safetensors file", str(file), EXPECTED) from error
    if not found:
        raise CheckpointError(f"the file has no tensors `NAME{end}`", str(file), EXPECTED)
    return found


def _of_archive(file: Path, shapes: Shapes) -> dict[str, Tensor]:
    with open_regular(file, None, CheckpointError, "the state of the optimizer") as opened:
        if opened.read(len(ZIP)) != ZIP:
            what = "the file is no zip archive of `torch.save`"
            raise CheckpointError(what, str(file), EXPECTED, f"{AGAIN}, or {CONVERT}")

    def fault(message: str) -> CheckpointError:
        return CheckpointError(
            f"the file is no archive of tensors alone: {shown(message)}", str(file), EXPECTED, CONVERT
        )

    with library_errors_as(fault, pickle.UnpicklingError, EOFError, struct.error):
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    content = _entries(loaded)
    outer = [content, *(_entries(content.get(place)) for place in PLACES)]
    saved = next((one for one in outer if isinstance(one.get("state"), dict)), {})
    states = {key: _entries(state) for key, state in _entries(saved.get("state")).items()}
    # Some parameters have none, such as those that Muon trains beside Adam.
    values = {key: state[SQUARES] for key, state in states.items() if SQUARES in state}
    if not values:
        what = f"the file has no {SQUARES} by parameter, as of flattened or quantized states"
        raise CheckpointError(what, str(file), EXPECTED, CONVERT)
    kinds = {type(key) for key in values}
    if kinds != {str} and kinds != {int}:
        what = "the states have neither names alone nor numbers alone"
        raise CheckpointError(what, str(file), EXPECTED, CONVERT)
    squares = {key: _dense(f"{key}.{SQUARES}", value, file) for key, value in values.items()}
    if kinds == {str}:
        return squares
    groups = _groups(saved.get("param_groups"))
    if groups is None:
        what = "the states have numbers, and `param_groups` does not list the numbers of the parameters"
        expected = "groups with a list of numbers, `params`, and with a list of names, `param_names`, or without it"
        raise CheckpointError(what, str(file), expected, CONVERT)
    names = _names_of_numbers(*groups, squares, shapes)
    if names is None:
        what = "the states have numbers that do not fit the order of the model's parameters"
        raise CheckpointError(what, str(file), "states by name, or of this model", CONVERT)
    return {names[key]: tensor for key, tensor in squares.items()}


def _entries(value: Any) -> dict[Any, Any]:
    """Return the entries of a mapping, and none for another value.

    An OrderedDict in a file can have attributes in the place of its methods.
    """
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _dense(name: str, value: Any, file: Path) -> Tensor:
    """Return a tensor of a file if it is dense, of floats and with its values, without attributes that a file set."""
    kind = type(value).__name__
    if type(value) in (Tensor, nn.Parameter):
        tensor = torch.detach(value)
        dense = tensor.layout == torch.strided and not tensor.is_nested
        if dense and tensor.device.type == "cpu" and tensor.dtype in FLOATS:
            return tensor
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        kind = f"{tensor.dtype}, {layout}, on {tensor.device.type}"
    what = f"{shown(name)} is no dense tensor of floats ({kind})"
    raise CheckpointError(what, str(file), EXPECTED, CONVERT)


def _groups(groups: Any) -> tuple[list[int], list[str]] | None:
    """Return the numbers of the parameters and the names beside them, or None if there are no such lists."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    entries = [_entries(group) for group in groups]
    numbers = [group.get("params", []) for group in entries]
    names = [group.get("param_names", []) for group in entries]
    if not all(isinstance(part, list | tuple) for part in numbers + names):
        return None
    flat_numbers = [number for part in numbers for number in part]
    flat_names = [name for part in names for name in part]
    if not all(type(number) is int for number in flat_numbers) or not all(type(name) is str for name in flat_names):
        return None
    return flat_numbers, flat_names


def _names_of_numbers(
    numbers: list[int], given: list[str], states: Mapping[int, Tensor], shapes: Shapes
) -> dict[int, str] | None:
    """Return the names of the parameters by their numbers in the groups, or None if they cannot be known."""
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    others = [name for name, shape in shapes.items() if len(shape) <= 1]
    for names in (given, [*matrices, *others], list(shapes)):
        named = dict(zip(numbers, names, strict=False))
        fits = (
            number in named and tuple(squares.shape) == shapes.get(_plain(named[number]))
            for number, squares in states.items()
        )
        if len(numbers) == len(names) and all(fits):
            return named
    return None


def _plain(name: str) -> str:
    """Return the name of a parameter in the model itself."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
