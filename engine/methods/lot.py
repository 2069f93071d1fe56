"""LOT: per layer, the task vector whose outputs are nearest to those of all experts on their own inputs.

Source: Sun et al., Towards Minimizing Feature Drift in Model Merging: Layer-wise Task Vector Fusion for Adaptive
Knowledge Integration, arXiv 2505.23859.
Formula: with Cₖ = XₖXₖᵀ of the inputs Xₖ [n, tokens] that a linear layer of expert k saw, matrices τₖ [m, n]:
τ = argmin Σₖ ‖(τ − τₖ)·Xₖ‖²_F = (Σₖ τₖ·Cₖ)·(Σₖ Cₖ)⁺, θ = θ₀ + λ·τ. The pseudo-inverse leaves out the eigenvalues of
Σₖ Cₖ below `rcond` times the largest, so that the base is kept in directions of inputs that no sample has. With
`ridge`, the inverse is that of Σₖ Cₖ + ρ·1, ρ = `ridge` times the mean of the diagonal of Σₖ Cₖ, and `rcond` is not
used. Tensors without samples, of which an expert has no inputs, and embedding and head: θ₀ + (λ/K)·Σₖ τₖ.
Options: `rcond` (1e-6), `ridge` (0), `lambda` (1.0).

The paper weights norms by the energy of their inputs, which are not collected: they are averaged here, as its biases.
An expert whose layer saw no token, as of a mixture of experts, has no part in that layer. The pseudo-inverse takes an
eigendecomposition, and depends on `rcond`; a `ridge` of 1e-3 takes one Cholesky factor instead, and is faster for
matrices of many inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

RCOND = Option(
    "rcond", 1e-6, "eigenvalues of the sum of the Gram matrices below this share of the largest count as zero",
    low=0, high=1,
)  # fmt: skip
RIDGE = Option(
    "ridge", 0.0, "ρ as a multiple of the mean diagonal of the sum of the Gram matrices; above 0, `rcond` is not used",
    low=0,
)  # fmt: skip

METHOD = Method(
    "lot",
    "per layer the task vector with outputs nearest to the experts', on their own inputs (LOT)",
    "Sun et al., arXiv 2505.23859",
    "θ = θ₀ + λ·(Σₖ τₖ·Cₖ)·(Σₖ Cₖ)⁺, Cₖ = XₖXₖᵀ of the inputs of expert k's layer",
    (RCOND, RIDGE, LAMBDA),
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

    layers = layers_of(tensor)
    if not layers:
        return mean_of_task_vectors(tensor)
    rcond, ridge = float(tensor.values["rcond"]), float(tensor.values["ridge"])
    return add_to_base(tensor, regress(layers, rcond=rcond, ridge=ridge))
