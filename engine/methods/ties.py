"""TIES: task vectors are trimmed, a sign is elected for every element, and those that have it are averaged.

Source: Yadav et al., TIES-Merging, arXiv 2306.01708; the semantics are mergekit 0.1.5's, and two options choose those
of the paper's published code. Formula: τ̂ₖ = the elements of τₖ that are largest by absolute value, max(1, ⌊density·n⌋)
of n; s = sign(Σₖ wₖ·τ̂ₖ), + where the sum is zero; A = the experts whose wₖ·τ̂ₖ has the sign s; θ = θ₀ + λ·Σ_A wₖ·τ̂ₖ /
Σ_A wₖ (no division if `normalize` is false). Of elements that are equal by absolute value the first of the tensor are
kept.
Options: `weight` (an expert, 0.1), `density` (an expert, 1.0), `normalize` (true), `lambda` (1.0), `rescale` (false);
`trim: model` counts the n elements over the whole model, and keeps all that are equal to the smallest that is kept;
`divide_by: count` divides by the number of experts in A instead of their weights.
The smallest element that is kept is found exactly by counting, in two passes, and never by sorting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import DENSITY, INT8_MASK, LAMBDA, WEIGHT, Method, Option, normalize, rescale

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


TRIM = Option(
    "trim",
    "tensor",
    "where `density` is counted: in each tensor, or over the whole model as the paper's code does",
    kind=str,
    choices=("tensor", "model"),
)


DIVIDE_BY = Option(
    "divide_by",
    "weight",
    "what `normalize` divides by: the weights of the experts that agree, or their count as the paper's code does",
    kind=str,
    choices=("weight", "count"),
)


METHOD = Method(
    "ties",
    "trimmed task vectors, a sign elected for every element, the mean of those that have it",
    "Yadav et al., TIES-Merging, arXiv 2306.01708",
    "θ = θ₀ + λ·Σ_A wₖ·τ̂ₖ / Σ_A wₖ, A: the experts that agree with sign(Σₖ wₖ·τ̂ₖ)",
    (WEIGHT, DENSITY, normalize(True), LAMBDA, rescale(False), TRIM, DIVIDE_BY, INT8_MASK),
)


def prepare(tensor: MergeTensor) -> Fill:
    """How the tensor's pieces are computed: two passes that count, where density is below 1, and one that merges."""
    from engine.methods.arithmetic.sparse import Dense, Trimmed
    from engine.methods.arithmetic.tensor import Sparse

    densities = [float(density) for density in tensor.each_own("density")]
    sparse: Sparse
    if all(density >= 1 for density in densities):
        sparse = Dense()
    elif tensor.thresholds is not None and tensor.values["trim"] == "model":
        sparse = Trimmed.everywhere(tensor.thresholds)
    else:
        sparse = Trimmed.within(tensor, densities)
    return tensor.elected(sparse)
