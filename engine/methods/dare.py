"""DARE: task vectors with elements dropped at random and the kept ones rescaled.

Source: Yu et al., Language Models are Super Mario, arXiv 2311.03099, with the semantics of mergekit 0.1.5; an option
selects the paper's scale.
Formula: τ̂ₖ = cₖ·mₖ∘τₖ with mₖ ~ Bernoulli(density); cₖ preserves the tensor's sum of absolute values
(`rescale_by: l1`), or is 1/density (`rescale_by: density`, the paper's 1/(1 − p)), or 1 if `rescale` is false. Then as
in Task Arithmetic (dare_linear) or TIES (dare_ties): θ = θ₀ + λ·Σₖ wₖ·τ̂ₖ, for dare_ties over the experts that agree in
sign.
Options: `weight` (per expert, 0.1), `density` (per expert, 1.0), `rescale` (true), `rescale_by` (l1), `normalize`
(false), `lambda` (1.0); dare_ties also `divide_by` (weight).
The mask of an element is a hash of seed, tensor, expert and the element's index, so it does not depend on the process
or the order of computation.
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
    "what `rescale` preserves: `l1` the sum of absolute values, `density` the expected value (the paper's 1/density)",
    kind=str,
    choices=("l1", "density"),
)

OPTIONS = (WEIGHT, DENSITY, rescale(True), RESCALE_BY, normalize(False), LAMBDA, INT8_MASK)

SOURCE = "Yu et al., Language Models are Super Mario, arXiv 2311.03099"

LINEAR = Method(
    "dare_linear",
    "randomly thinned task vectors, combined by Task Arithmetic",
    SOURCE,
    "θ = θ₀ + λ·Σₖ wₖ·τ̂ₖ, τ̂ₖ = cₖ·mₖ∘τₖ, mₖ ~ Bernoulli(density)",
    OPTIONS,
    aliases=("dare_ta",),
)

TIES = Method(
    "dare_ties",
    "randomly thinned task vectors, combined by the sign election of TIES",
    SOURCE,
    "θ = θ₀ + λ·Σ_A wₖ·τ̂ₖ, τ̂ₖ = cₖ·mₖ∘τₖ, A: the experts that agree in sign",
    (*OPTIONS, DIVIDE_BY),
)


def prepare_linear(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill` for dare_linear: a merging pass, after a pass for the scales if they need one."""
    weights = [float(weight) for weight in tensor.each_own("weight")]
    return tensor.summed(_thinned(tensor), [weight * scale(tensor, weights) for weight in weights])


def prepare_ties(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill` for dare_ties, with the passes of `prepare_linear`."""
    return tensor.elected(_thinned(tensor))


def _thinned(tensor: MergeTensor) -> Sparse:
    from engine.methods.arithmetic.sparse import Dense, Thinned

    densities = [float(density) for density in tensor.each_own("density")]
    if all(density >= 1 for density in densities):
        return Dense()
    return Thinned(tensor.seeds(), densities)
