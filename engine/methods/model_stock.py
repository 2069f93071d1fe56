"""Model Stock: the experts' mean, pulled towards the base by the angle between their task vectors.

Source: Jang et al., Model Stock, arXiv 2403.19522, with the semantics of mergekit 0.1.5.
Formula: θ = θ₀ + t·(1/K)·Σₖ τₖ, t = K·c/(1 + (K − 1)·c), where c is the mean of cos ∠(τᵢ, τⱼ) over all pairs.
FusionBench 0.2.33 takes the cosine of the mean angle, which for more than two experts is slightly another number.
Options: `filter_wise` (false): an angle for each row of a tensor, along its last dimension.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.methods.options import Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


METHOD = Method(
    "model_stock",
    "interpolation between the base and the experts' mean, by the angle between their task vectors",
    "Jang et al., Model Stock, arXiv 2403.19522",
    "θ = θ₀ + t·(1/K)·Σₖ τₖ, t = K·c/(1 + (K − 1)·c), c = mean of cos ∠(τᵢ, τⱼ)",
    (Option("filter_wise", False, "an angle for each row of a tensor instead of one for the tensor", kind=bool),),
    least=3,
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: a pass over the experts for the angle of the tensor, and one for the sum."""
    from engine.methods.arithmetic.angles import interpolated_rows, interpolations

    if tensor.values["filter_wise"] and len(tensor.shape) > 1:
        return interpolated_rows(tensor)
    experts = len(tensor.task_vectors)
    (t,) = interpolations(tensor, max(1, math.prod(tensor.shape))).tolist()
    return tensor.sum_of_task_vectors([t / experts] * experts)
