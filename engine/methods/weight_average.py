"""Weight average: the plain mean of the experts.

Source: Wortsman et al., Model soups, arXiv 2203.05482 (the uniform soup).
Formula: θ = (1/K)·Σₖ θₖ, without the base. No options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import Method

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


METHOD = Method(
    "weight_average",
    "the plain mean of the experts",
    "Wortsman et al., Model soups, arXiv 2203.05482",
    "θ = (1/K)·Σₖ θₖ",
    base="optional",
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one pass over every expert."""
    experts = len(tensor.task_vectors)
    return tensor.sum_of_models(0.0, [1 / experts] * experts)
