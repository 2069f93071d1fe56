"""RegMean: per layer, the weight whose outputs are nearest to those of all experts on their own inputs.

Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849, equation 2 and
section 3.3.
Formula: with Cₖ = XₖXₖᵀ/Nₖ of the Nₖ inputs that a linear layer of expert k saw, C̃ₖ = α·Cₖ + (1 − α)·diag(Cₖ), and
matrices Wₖ of τₖ or θₖ by `domain`: W = (Σₖ Wₖ·C̃ₖ)·(Σₖ C̃ₖ + ρ·1)⁻¹, ρ = `ridge` times the mean of the diagonal of
Σₖ C̃ₖ. task_vector: θ = θ₀ + λ·W of τₖ. weight: θ = θ₀ + λ·(W − θ₀) of θₖ. Without a ridge, a singular matrix has its
pseudo-inverse instead, which leaves out the eigenvalues below `rcond` times the largest. Tensors without samples, of
which no expert has inputs, and embedding and head: θ₀ + (λ/K)·Σₖ τₖ.
Options: `alpha` (0.1), `domain` (task_vector), `rcond` (1e-6), `ridge` (0), `lambda` (1.0).

The published formula is that of `domain: weight`. Where Σₖ C̃ₖ is regular, the domains are the same. Where it is not,
for too few samples or inputs that are always zero, `weight` has no base left in the directions that no sample has,
nor, with a ridge, all of it; `task_vector` keeps it. An `alpha` of 0.1 is used for language models by
MergeBench (arXiv 2505.10833); the paper has 0.9 and 0.1. At 1 the method is LOT with means instead of sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.lot import RCOND, RIDGE
from engine.methods.options import LAMBDA, Footprint, Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

ALPHA = Option("alpha", 0.1, "α, the factor of the elements of the Gram matrices off their diagonals", low=0, high=1)
DOMAIN = Option(
    "domain",
    "task_vector",
    "what is fitted: the `task_vector`, which keeps the base where no sample is, or the `weight` as published",
    kind=str,
    choices=("task_vector", "weight"),
)

METHOD = Method(
    "regmean",
    "per layer the weight with outputs nearest to the experts', on their own inputs (RegMean)",
    "Jin et al., arXiv 2212.09849",
    "W = (Σₖ Wₖ·C̃ₖ)·(Σₖ C̃ₖ)⁻¹, C̃ₖ = α·XₖXₖᵀ/Nₖ + (1 − α)·diag(XₖXₖᵀ/Nₖ)",
    (ALPHA, DOMAIN, RCOND, RIDGE, LAMBDA),
    footprint=Footprint(squares=7),
    statistics=("gram",),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element, or the statistics cannot be read.
    """
    from engine.methods.arithmetic.matrices import add_to_base, mean_of_task_vectors
    from engine.methods.arithmetic.regression import layers_of, regress

    of_weights = tensor.values["domain"] == "weight"
    layers = layers_of(tensor, of_weights)
    if not layers:
        return mean_of_task_vectors(tensor)
    fitted = regress(
        layers,
        per_token=True,
        off_diagonal=float(tensor.values["alpha"]),
        rcond=float(tensor.values["rcond"]),
        ridge=float(tensor.values["ridge"]),
    )
    return add_to_base(tensor, fitted - tensor.base.float() if of_weights else fitted)
