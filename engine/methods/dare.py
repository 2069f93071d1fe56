"""DARE: elements of task vectors are dropped at random, and the others scaled up for them.

Source: Yu et al., Language Models are Super Mario, arXiv 2311.03099; the semantics are mergekit 0.1.5's, and an option
chooses the paper's scale. Formula: τ̂ₖ = cₖ·mₖ∘τₖ with mₖ ~ Bernoulli(density); cₖ keeps the sum of absolute values of
the tensor (`rescale_by: l1`) or is 1/density (`rescale_by: density`, the paper's 1/(1 − p)), or 1 if `rescale` is
false. Then as Task Arithmetic (dare_linear) or TIES (dare_ties): θ = θ₀ + λ·Σₖ wₖ·τ̂ₖ, over the experts that agree in
sign for dare_ties. Options: `weight` (an expert, 0.1), `density` (an expert, 1.0), `rescale` (true), `rescale_by` (l1),
`normalize` (false), `lambda` (1.0); `divide_by` (weight) of dare_ties. An element's mask is a hash of the seed, the
tensor, the expert and the element's place: whoever computes it, wherever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import DENSITY, INT8_MASK, LAMBDA, WEIGHT, Method, Option, normalize, rescale
from engine.methods.task_arithmetic import scale
from engine.methods.ties import DIVIDE_BY

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor, Sparse
    from engine.task_vectors.pipeline import Fill


RESCALE_BY = Option(
    "rescale_by",
    "l1",
    "what `rescale` keeps: the sum of absolute values, or the expected value, by 1/density as in the paper",
    kind=str,
    choices=("l1", "density"),
)


OPTIONS = (WEIGHT, DENSITY, rescale(True), RESCALE_BY, normalize(False), LAMBDA, INT8_MASK)


SOURCE = "Yu et al., Language Models are Super Mario, arXiv 2311.03099"


LINEAR = Method(
    "dare_linear",
    "task vectors thinned at random, then Task Arithmetic",
    SOURCE,
    "θ = θ₀ + λ·Σₖ wₖ·τ̂ₖ, τ̂ₖ = cₖ·mₖ∘τₖ, mₖ ~ Bernoulli(density)",
    OPTIONS,
    aliases=("dare_ta",),
)


TIES = Method(
    "dare_ties",
    "task vectors thinned at random, then the signs of TIES",
    SOURCE,
    "θ = θ₀ + λ·Σ_A wₖ·τ̂ₖ, τ̂ₖ = cₖ·mₖ∘τₖ, A: the experts that agree in sign",
    (*OPTIONS, DIVIDE_BY),
)


def prepare_linear(tensor: MergeTensor) -> Fill:
    """How the tensor's pieces are computed: one pass for the scales, where they need one, and one that merges."""
    weights = [float(weight) for weight in tensor.each_own("weight")]
    return tensor.summed(_thinned(tensor), [weight * scale(tensor, weights) for weight in weights])


def prepare_ties(tensor: MergeTensor) -> Fill:
    """As `prepare_linear`, with an election of signs."""
    return tensor.elected(_thinned(tensor))


def _thinned(tensor: MergeTensor) -> Sparse:
    from engine.methods.arithmetic.sparse import Dense, Thinned

    densities = [float(density) for density in tensor.each_own("density")]
    if all(density >= 1 for density in densities):
        return Dense()
    return Thinned(tensor.seeds(), densities)
