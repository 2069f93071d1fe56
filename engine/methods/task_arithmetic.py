"""Task Arithmetic: the base plus a weighted sum of task vectors.

Source: Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089, with the semantics of mergekit 0.1.5.
Formula: θ = θ₀ + λ·Σₖ wₖ·τₖ, the sum divided by Σₖ wₖ if `normalize` is true. Computed in float32, rounded once.
Options: `weight` (per expert, 0.1), `normalize` (false), `lambda` (1.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import INT8_MASK, LAMBDA, WEIGHT, Method, normalize

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


# As in mergekit, a smaller sum of weights does not divide.
LEAST_SUM = 1e-8

METHOD = Method(
    "task_arithmetic",
    "the base plus a weighted sum of task vectors",
    "Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089",
    "θ = θ₀ + λ·Σₖ wₖ·τₖ",
    (WEIGHT, normalize(False), LAMBDA, INT8_MASK),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one pass over every expert."""
    weights = [float(weight) for weight in tensor.each_own("weight")]
    return tensor.sum_of_task_vectors([weight * scale(tensor, weights) for weight in weights])


def scale(tensor: MergeTensor, weights: list[float]) -> float:
    """Return the factor of the weighted sum: λ, or λ / Σₖ wₖ if `normalize` is true."""
    total = sum(weights)
    divisor = total if tensor.values["normalize"] and abs(total) >= LEAST_SUM else 1.0
    return float(tensor.values["lambda"]) / divisor
