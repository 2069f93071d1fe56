"""Linear: a weighted mean of models (model soups).

Source: Wortsman et al., Model soups, arXiv 2203.05482, with the semantics of mergekit 0.1.5.
Formula: θ = Σᵢ wᵢ·θᵢ / Σᵢ wᵢ over the models, including the base if it is listed among them; without the division if
`normalize` is false. Computed in float32, rounded once.
Options: `weight` (per model, 1.0), `normalize` (true).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.methods.options import Method, Option, Settings, normalize

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


def total_weight(values: Settings, own: Sequence[Settings], base: Settings | None, tensor: str) -> float:
    """Return Σᵢ wᵢ of a tensor, or 1 without `normalize`.

    Raises:
        ConfigError: `normalize` is true and the weights sum to zero.
    """
    if not values["normalize"]:
        return 1.0
    total = sum(float(each["weight"]) for each in own) + (float(base["weight"]) if base is not None else 0.0)
    if total == 0:
        raise ConfigError(
            "the weights sum to zero and cannot be normalized",
            tensor,
            do="change the weights, or set `normalize: false` in `parameters`",
        )
    return total


METHOD = Method(
    "linear",
    "a weighted mean of the models",
    "Wortsman et al., Model soups, arXiv 2203.05482",
    "θ = Σᵢ wᵢ·θᵢ / Σᵢ wᵢ",
    (Option("weight", 1.0, "wᵢ, the weight of the model", "model"), normalize(True)),
    base="ignored",
    check=lambda tensor, models, values, own, base: total_weight(values, own, base, tensor),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one pass over every model. For errors see `total_weight`."""
    total = total_weight(tensor.values, tensor.own, tensor.base_values, tensor.name)
    base_weight = float(tensor.base_values["weight"]) if tensor.base_values is not None else 0.0
    weights = [float(weight) for weight in tensor.each_own("weight")]
    return tensor.sum_of_models(base_weight / total, [weight / total for weight in weights])
