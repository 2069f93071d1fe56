"""Iso-C: the sum of the task vectors with all singular values made equal.

Source: Marczak et al., No Task Left Behind: Isotropic Model Merging, arXiv 2502.04959 (Iso-C).
Formula: U·Σ·Vᵀ = Σₖ τₖ, σ̄ = mean(diag Σ); θ = θ₀ + λ·σ̄·U·Vᵀ. Tensors that are not matrices (biases, norms) and
those with one row per token (embedding, head): θ₀ + (λ/K)·Σₖ τₖ.
Options: `lambda` (1.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


METHOD = Method(
    "iso",
    "the sum of the task vectors with all singular values made equal (Iso-C)",
    "Marczak et al., No Task Left Behind, arXiv 2502.04959",
    "θ = θ₀ + λ·σ̄·U·Vᵀ, U·Σ·Vᵀ = Σₖ τₖ, σ̄ = mean(diag Σ)",
    (LAMBDA,),
    footprint=Footprint(),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`, after one singular value decomposition of the sum."""
    import torch

    from engine.checkpoints.vocabulary import is_matrix
    from engine.methods.arithmetic.matrices import add_to_base, changed, mean_of_task_vectors

    if not is_matrix(tensor.shape, tensor.is_vocabulary):
        return mean_of_task_vectors(tensor)
    total = torch.zeros(tensor.shape)
    for tau in changed(tensor):
        total += tau
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    return add_to_base(tensor, (u * s.mean()) @ vt)
