"""The methods that only mergekit's library has, run by that library tensor by tensor.

Optional: `pip install ".[mergekit]"`. Uses the public interface of mergekit 0.1.5 (`merge_methods`), not its planner,
loaders or files. A tensor is in memory as a whole in float32, once for the base and once for every expert.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.methods.options import Footprint, Method, Option

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pieces import Piece
    from engine.task_vectors.pipeline import Fill


INSTALL = 'pip install ".[mergekit]"'

# Methods that mergekit 0.1.5 has in addition, described here so that they can be listed without the library.
NAMES = {
    "nuslerp": "spherical interpolation of task vectors or models, with weights",
    "multislerp": "spherical interpolation of any number of models",
    "karcher": "the Riemannian (Karcher) mean of models",
    "sce": "elements of high variance selected, weighted per expert, minority signs erased",
    "della": "task vectors randomly thinned by magnitude rank, with the sign election of TIES",
    "della_linear": "task vectors randomly thinned by magnitude rank",
    "breadcrumbs": "task vectors without their largest and smallest elements",
    "breadcrumbs_ties": "breadcrumbs with the sign election of TIES",
    "nearswap": "the base, interpolated towards another model where the two are close",
    "arcee_fusion": "the base with the most important changes of one model",
    "ram": "Reinforced Agent Merging: changes of one expert kept, shared changes averaged",
    "ramplus_tl": "RAM with the changes of one expert scaled up by the share of common changes",
}

# Name of the base among the inputs; no expert's name contains a NUL.
BASE = "\0base"

# Some methods draw from torch's global generator, so tensors are merged one at a time, each with its own seed.
_generator = threading.Lock()


@cache  # the options are looked up for every tensor, and building them is slow
def method(name: str) -> Method | None:
    """Return the library's method `name` as a `Method`, or None if the library has no such method."""
    from mergekit.merge_methods import registered_methods

    for registered in registered_methods():
        if registered.spec.name == name:
            spec = registered.spec
            return Method(
                name,
                NAMES.get(name, spec.pretty_name or name),
                spec.reference_url or "mergekit",
                "see mergekit",
                tuple(_option(parameter) for parameter in spec.parameters),
                base={"required": "required", "ignored": "ignored"}.get(spec.contract.base.value, "optional"),  # type: ignore[arg-type]
                footprint=Footprint(per_expert=2),
            )
    return None


def check_models(name: str, models: list[str], has_base: bool) -> None:
    """Check that the method accepts these models, with or without a base.

    Raises:
        ConfigError: the library refuses them; the error contains its message.
    """
    from mergekit.merge_methods import get

    try:
        get(name).validate_inputs([*models, BASE] if has_base else models, BASE if has_base else None)
    except ValueError as error:
        raise ConfigError(f"{name} does not take these models: {error}", "models") from error


def preparation(name: str) -> Callable[[MergeTensor], Fill]:
    """Return the function that merges one tensor by the library's method `name`."""
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
        by_model = {model: values[parameter.name] for model, values in zip(tensor.models, tensor.own, strict=True)}
        if tensor.has_base and parameter.scope.value == "input":
            by_model[BASE] = (tensor.base_values or {})[parameter.name]
        parameters[parameter.name] = by_model
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
        raise ConfigError(f"mergekit's {name} cannot merge the tensor: {error}", tensor.name) from error
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
