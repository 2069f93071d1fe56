"""The squared gradients in the state of Adam: running means that a training leaves, read without running its code.

A file is safetensors, with one tensor `NAME.exp_avg_sq` per parameter, or a zip archive of `torch.save`, which is
mapped into memory and unpickled with `weights_only`. Its states are by name, by number with `param_names` beside them
(`AdamW(model.named_parameters())`), or by number alone, as the Trainer of transformers saves them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.untrusted import check_regular, library_errors_as, shown

SQUARES = "exp_avg_sq"
Shapes = Mapping[str, tuple[int, ...]]
# Parts that wrappers of a model put into the names of its parameters.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Where a state is in what trainers save around it.
PLACES = ("optimizer", "optimizer_state_dict", "optim")
EXPECTED = "the state of Adam or AdamW by `torch.save`, or safetensors with tensors `NAME.exp_avg_sq`"
CONVERT = "save the tensors `exp_avg_sq` from your training, by the names of the parameters, as safetensors"


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
            found = {name.removesuffix(end): opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError("not a valid safetensors file", str(file), EXPECTED) from error
    if not found:
        raise CheckpointError(f"the file has no tensors `NAME{end}`", str(file), EXPECTED)
    return found


def _of_archive(file: Path, shapes: Shapes) -> dict[str, Tensor]:
    def fault(message: str) -> CheckpointError:
        return CheckpointError(
            f"the file is no archive of tensors alone: {shown(message)}", str(file), EXPECTED, CONVERT
        )

    with library_errors_as(fault, pickle.UnpicklingError, EOFError):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    outer = [content, *(content.get(place) for place in PLACES)] if isinstance(content, dict) else []
    saved = next((one for one in outer if isinstance(one, dict) and isinstance(one.get("state"), dict)), None)
    states: dict[Any, Tensor] = {}
    for key, state in (saved or {"state": {}})["state"].items():
        squares = state.get(SQUARES) if isinstance(state, dict) else None
        # Some parameters have none, such as those that Muon trains beside Adam; quantized ones are integers.
        if isinstance(squares, Tensor) and squares.is_floating_point():
            states[key] = squares
    if saved is None or not states:
        what = f"the file has no {SQUARES} by parameter, as of flattened or quantized states"
        raise CheckpointError(what, str(file), EXPECTED, CONVERT)
    if all(isinstance(key, str) for key in states):
        return states
    names = _names_of_numbers(saved.get("param_groups"), states, shapes)
    if names is None:
        what = "the states have numbers that do not fit the order of the model's parameters"
        raise CheckpointError(what, str(file), "states by name, or of this model", CONVERT)
    return {names[key]: squares for key, squares in states.items()}


def _names_of_numbers(groups: Any, states: Mapping[Any, Tensor], shapes: Shapes) -> dict[int, str] | None:
    """Return the names of the parameters by their numbers in the groups, or None if they cannot be known."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    numbers = [number for group in groups for number in group.get("params", [])]
    given = [name for group in groups for name in group.get("param_names", [])]
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
