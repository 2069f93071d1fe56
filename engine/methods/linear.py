"""Linear: a weighted mean of models (model soups).

Source: Wortsman et al., Model soups, arXiv 2203.05482, with the semantics of mergekit 0.1.5.
Formula: θ = Σᵢ wᵢ·θᵢ / Σᵢ wᵢ over the models, including the base if it is listed among them; without the division if
`normalize` is false. Computed in float32, rounded once.
Options: `weight` (per model, 1.0), `normalize` (true).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.methods.options import Method, Option, normalize

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


METHOD = Method(
    "linear",
    "a weighted mean of the models",
    "Wortsman et al., Model soups, arXiv 2203.05482",
    "θ = Σᵢ wᵢ·θᵢ / Σᵢ wᵢ",
    (Option("weight", 1.0, "wᵢ, the weight of the model", "model"), normalize(True)),
    base="optional",
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one pass over every model.

    Raises:
        ConfigError: `normalize` is true and the weights of the tensor sum to zero.
    """
    weights = [float(weight) for weight in tensor.each_own("weight")]
    base_weight = float(tensor.base_values["weight"]) if tensor.base_values is not None else 0.0
    total = sum(weights) + base_weight if tensor.values["normalize"] else 1.0
    if total == 0:
        raise ConfigError(
            "the weights sum to zero and cannot be normalized",
            tensor.name,
            do="change the weights, or set normalize: false",
        )
    return tensor.sum_of_models(base_weight / total, [weight / total for weight in weights])
