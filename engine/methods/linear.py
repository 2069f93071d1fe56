"""Linear: a weighted mean of models (model soups).

Source: Wortsman et al., Model soups, arXiv 2203.05482; the semantics are mergekit 0.1.5's.
Formula: θ = Σᵢ wᵢ·θᵢ / Σᵢ wᵢ over the models, and the base where it is listed among them; without the division if
`normalize` is false. In float32, rounded once.
Options: `weight` (a model, 1.0), `normalize` (true).
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
    (Option("weight", 1.0, "wᵢ, the model's weight", "model"), normalize(True)),
    base="optional",
)


def prepare(tensor: MergeTensor) -> Fill:
    """How the tensor's pieces are computed: one pass over every model.

    Raises:
        ConfigError: the weights of a tensor sum to zero and are to be divided by it.
    """
    weights = [float(weight) for weight in tensor.each_own("weight")]
    own = float(tensor.base_values["weight"]) if tensor.base_values is not None else 0.0
    total = sum(weights) + own if tensor.values["normalize"] else 1.0
    if total == 0:
        raise ConfigError(
            "the weights sum to zero, by which they would be divided",
            tensor.name,
            do="other weights, or normalize: false",
        )
    return tensor.sum_of_models(own / total, [weight / total for weight in weights])
