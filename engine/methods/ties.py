"""TIES: trimmed task vectors, averaged per element over the experts that agree with an elected sign.

Source: Yadav et al., TIES-Merging, arXiv 2306.01708, with the semantics of mergekit 0.1.5; two options select those of
the paper's published code. Formula: τ̂ₖ = the max(1, ⌊density·n⌋) elements of τₖ with the largest absolute values, of n;
s = sign(Σₖ wₖ·τ̂ₖ), + where the sum is zero; A = the experts whose wₖ·τ̂ₖ has the sign s; θ = θ₀ + λ·Σ_A wₖ·τ̂ₖ / Σ_A wₖ
(no division if `normalize` is false). Among elements with absolute values equal to the threshold, the first ones of the
tensor are kept.
Options: `weight` (per expert, 0.1), `density` (per expert, 1.0), `normalize` (true), `lambda` (1.0), `rescale` (false);
`trim: model` counts the n elements over the whole model and keeps all that are equal to the threshold; `divide_by:
count` divides by the number of experts in A instead of the sum of their weights.
The threshold is found exactly, by counting in two passes instead of sorting. FusionBench 0.2.33, whose TIES is that of
published code, keeps one element more, ⌊density·n⌋ + 1, and the same merge otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import DENSITY, INT8_MASK, LAMBDA, WEIGHT, Method, Option, normalize, rescale
from engine.methods.prepass import Group, selection

if TYPE_CHECKING:
    from engine.methods.arithmetic.selection import Counts
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


TRIM = Option(
    "trim",
    "tensor",
    "scope of `density`: each `tensor`, or the whole `model` as in the paper's code",
    kind=str,
    choices=("tensor", "model"),
)

DIVIDE_BY = Option(
    "divide_by",
    "weight",
    "divisor of `normalize`: the agreeing experts' `weight`, or their `count` as in the paper's code",
    kind=str,
    choices=("weight", "count"),
)

METHOD = Method(
    "ties",
    "trimmed task vectors, averaged per element over the experts that agree with the elected sign",
    "Yadav et al., TIES-Merging, arXiv 2306.01708",
    "θ = θ₀ + λ·Σ_A wₖ·τ̂ₖ / Σ_A wₖ, A: the experts that agree with sign(Σₖ wₖ·τ̂ₖ)",
    (WEIGHT, DENSITY, normalize(True), LAMBDA, rescale(False), TRIM, DIVIDE_BY, INT8_MASK),
)


def count(tensor: MergeTensor, high: Counts | None) -> Counts:
    """Return the counts of a tensor's elements by one half of their bits, [K, bins]; see `sparse.counts`."""
    from engine.methods.arithmetic.sparse import counts

    return counts(tensor, high)


def keep(counts: Counts, group: Group) -> list[int | None]:
    """Return how many elements of the whole model each expert keeps, by the mean of its densities."""
    from engine.methods.arithmetic.sparse import kept_of

    return [kept_of(density, group.numel) for density in group.means("density")]


PREPASSES = selection("thresholds", count, keep, wanted=lambda values: values["trim"] == "model")


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one merging pass, after two counting passes if a density is below 1."""
    from engine.methods.arithmetic.sparse import Dense, Trimmed
    from engine.methods.arithmetic.tensor import Sparse

    densities = [float(density) for density in tensor.each_own("density")]
    sparse: Sparse
    if all(density >= 1 for density in densities):
        sparse = Dense()
    elif tensor.values["trim"] == "model":
        sparse = Trimmed.everywhere(tensor.known["thresholds"])
    else:
        sparse = Trimmed.within(tensor, densities)
    return tensor.elected(sparse)
