"""The methods that mergekit's own library has and this package has not, run tensor by tensor by that library.

Optional: `pip install ".[mergekit]"`. Knows the library's public interface of 0.1.5 (`merge_methods`), nothing of its
planner, loaders or files. A tensor of the base and of every expert stands in memory whole, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.methods.options import Method, Option

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pieces import Piece
    from engine.task_vectors.pipeline import Fill


INSTALL = 'pip install ".[mergekit]"'


# What mergekit 0.1.5 has beside ours, with a line for those who have not installed it.
NAMES = {
    "slerp": "spherical interpolation between two models",
    "nuslerp": "spherical interpolation of task vectors or models, with weights",
    "multislerp": "spherical interpolation of any number of models",
    "karcher": "the Riemannian (Karcher) mean of models",
    "model_stock": "towards the base by the angle between experts",
    "sce": "select by variance, calculate weights, erase minorities",
    "della": "task vectors thinned at random by rank, with the signs of TIES",
    "della_linear": "task vectors thinned at random by rank",
    "breadcrumbs": "task vectors without their largest and smallest elements",
    "breadcrumbs_ties": "breadcrumbs with the signs of TIES",
    "nearswap": "the base moved to where the other model is near",
    "arcee_fusion": "the elements of one model that changed much",
    "ram": "agents' weights where one or several changed them",
    "ramplus_tl": "ram, scaled up by how much is shared",
    "passthrough": "one model, scaled",
}


# The base among the inputs; no expert's name has such a sign.
BASE = "\0base"


# Some draw random numbers from torch's one generator: one tensor at a time, from a seed of its own.
_generator = threading.Lock()


@cache  # options make their checks once, and are asked for every tensor
def method(name: str) -> Method | None:
    """The library's method of that name as one of ours; None where it has none."""
    from mergekit.merge_methods import registered_methods

    for found in registered_methods():
        if found.spec.name == name:
            spec = found.spec
            return Method(
                name,
                NAMES.get(name, spec.pretty_name or name),
                spec.reference_url or "mergekit",
                "see mergekit",
                tuple(_option(parameter) for parameter in spec.parameters),
                base="required" if spec.contract.base.value == "required" else "optional",
                whole=True,
            )
    return None


def check_models(name: str, models: list[str], has_base: bool) -> None:
    """Whether the method takes so many models, with or without a base.

    Raises:
        ConfigError: in the library's words.
    """
    from mergekit.merge_methods import get

    try:
        get(name).validate_inputs([*models, BASE] if has_base else models, BASE if has_base else None)
    except ValueError as error:
        raise ConfigError(f"{name} does not take these models: {error}", "models") from error


def preparation(name: str) -> Callable[[MergeTensor], Fill]:
    """The method's arithmetic: the library's, on one tensor."""
    return lambda tensor: _prepare(name, tensor)


def _prepare(name: str, tensor: MergeTensor) -> Fill:
    import torch
    from mergekit.merge_methods import get, merge_state_dicts

    base = tensor.base.float()
    models = [(model, base + tensor.task_vector(k)) for k, model in enumerate(tensor.models)]
    if tensor.has_base:
        models.insert(len(models) if tensor.base_place is None else tensor.base_place, (BASE, base))
    parameters: dict[str, Any] = dict(tensor.values)
    for parameter in get(name).spec.input_parameters:
        own = {model: mine[parameter.name] for model, mine in zip(tensor.models, tensor.own, strict=True)}
        if tensor.has_base and parameter.scope.value == "input":
            own[BASE] = (tensor.base_values or {})[parameter.name]
        parameters[parameter.name] = own
    parameters = {option: value for option, value in parameters.items() if value is not None}
    try:
        with _generator, torch.no_grad():
            torch.manual_seed(tensor.tensor_seed())
            merged = merge_state_dicts(
                {model: {tensor.name: weight} for model, weight in models},
                name,
                parameters=parameters,
                base=BASE if tensor.has_base else None,
            )[tensor.name]
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"mergekit's {name} refuses the tensor: {error}", tensor.name) from error
    merged_N = merged.reshape(-1)

    def fill(piece: Piece, out_N: Tensor) -> None:
        out_N.copy_(merged_N[piece.start : piece.stop])

    return fill


def _option(parameter: Any) -> Option:
    scope = {"shared": "merge", "non_base": "expert", "input": "model"}[parameter.scope.value]
    return Option(
        parameter.name,
        None if parameter.required else parameter.default,
        parameter.description or "see mergekit",
        scope,  # type: ignore[arg-type]
        kind=parameter.value_type,
        required=parameter.required,
    )
