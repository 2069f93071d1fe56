"""DOGE: task vectors corrected by a common Δ that lowers their interference outside of a shared subspace.

Source: Wei et al., Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, arXiv 2501.01230, in its
form without data on top of task arithmetic (DOGE TA), as in FusionBench's `doge_ta`.
Formula, of matrices τₖ [m, n] with m rows, λₖ = `eta`/‖τₖ‖_F: Δ minimises
Σₖ Σᵢ (Σⱼ [τₖ∘(τₖ − Σₗ λₗ·(τₗ + Δ))]ᵢⱼ)², from 0 by `steps` steps of Adam with the gradient (I − U·Uᵀ)·∇; U are the
⌊min(m, n)/`subspace`⌋ leading left singular vectors of [U₁ … U_K], and Uₖ the ⌊min(m, n)/K⌋ leading ones of τₖ.
θ = θ₀ + λ·Σₖ λₖ·Mₖ∘(τₖ + Δ), with Mₖ = 1 at the `density` largest absolute values of τₖ over all matrices of the model,
and at all that are equal to the smallest of them. Tensors that are not matrices, which the published code leaves as in
the base: θ₀ + (λ/K)·Σₖ τₖ.
Options: `eta` (0.07), `density` (per expert, 0.3), `subspace` (6), `steps` (400), `learning_rate` (1e-4), `lambda`
(1.0).

FusionBench's keeps one element more, ⌊density·n⌋ + 1, and the same merge otherwise. Directions that only rounding
decides, of zero singular values, are left out of U and Uₖ. The gradient of row i is
−2·Λ·Σₖ eₖᵢ·τₖᵢ with Λ = Σₖ λₖ and the inner sum eₖᵢ. A step takes two products with all task vectors of a matrix, and
K matrices of its size are in memory.
Letters: m rows and n columns, K experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option
from engine.methods.prepass import Group, selection

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.arithmetic.selection import Counts
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

ETA = Option("eta", 0.07, "η, the norm that each task vector of a matrix is scaled to", low=0)
DENSITY = Option("density", 0.3, "fraction of a model's task vector elements that is kept", "expert", low=0, high=1)
SUBSPACE = Option("subspace", 6.0, "the shared subspace has 1/`subspace` of the directions of a matrix", low=1)
STEPS = Option("steps", 400, "gradient descent steps per tensor", kind=int, low=0)
LEARNING_RATE = Option("learning_rate", 1e-4, "learning rate of Adam", low=0)

METHOD = Method(
    "doge",
    "task vectors with a common correction, learned outside of the subspace that they share (DOGE, AdaPGD)",
    "Wei et al., Adaptive Projective Gradient Descent, arXiv 2501.01230",
    "θ = θ₀ + λ·Σₖ λₖ·Mₖ∘(τₖ + Δ), λₖ = η/‖τₖ‖_F",
    (ETA, DENSITY, SUBSPACE, STEPS, LEARNING_RATE, LAMBDA),
    footprint=Footprint(18, per_expert=2),
)


def _is_matrix(tensor: MergeTensor) -> bool:
    from engine.checkpoints.vocabulary import is_matrix

    return is_matrix(tensor.shape, tensor.is_vocabulary)


def _count(tensor: MergeTensor, high: Counts | None) -> Counts:
    """Return the counts of |τₖ| of a matrix, [K, bins]; zeros for other tensors, which have no mask."""
    from engine.methods.arithmetic.sparse import counts, no_counts

    return counts(tensor, high) if _is_matrix(tensor) else no_counts(len(tensor.task_vectors), high)


def _keep(counts: Counts, group: Group) -> list[int | None]:
    from engine.methods.arithmetic.sparse import kept_of

    elements = counts.sum(axis=1).tolist()
    return [kept_of(density, count) for density, count in zip(group.means("density"), elements, strict=True)]


PREPASSES = selection("thresholds", _count, _keep)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`, after `steps` optimiser steps.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element.
    """
    import torch

    from engine.methods.arithmetic.matrices import add_to_base, mean_of_task_vectors

    if not _is_matrix(tensor):
        return mean_of_task_vectors(tensor)
    rows, columns = tensor.shape
    experts = range(len(tensor.task_vectors))
    tau_mKn = torch.empty(rows, len(experts), columns)
    for k in experts:
        tau_mKn[:, k] = tensor.task_vector(k)
    norms = [float(tau_mKn[:, k].norm()) for k in experts]
    weight_K = torch.tensor([float(tensor.values["eta"]) / norm if norm else 0.0 for norm in norms])
    delta = _descend(tensor, tau_mKn, weight_K, _shared(tensor))
    total = torch.zeros(rows, columns)
    for k, threshold in enumerate(tensor.known["thresholds"]):
        tau = tau_mKn[:, k]
        mask = tau.abs().view(torch.int32) >= threshold.bits
        total.add_((tau + delta) * mask, alpha=float(weight_K[k]))
    return add_to_base(tensor, total)


def _shared(tensor: MergeTensor) -> Tensor:
    """Return U [m, r], orthonormal. Δ stays orthogonal to it, but for Adam's scale of each element."""
    import torch

    from engine.methods.arithmetic.matrices import changed_parts, leading

    smaller = min(tensor.shape)
    parts = changed_parts(tensor, smaller // len(tensor.task_vectors))
    own = torch.cat([torch.zeros(tensor.shape[0], 0), *(u for u, _, _ in parts)], dim=1)
    rank = int(smaller / float(tensor.values["subspace"]))
    return leading(own, min(rank, own.shape[1]))[0] if own.shape[1] else own


def _descend(tensor: MergeTensor, tau_mKn: Tensor, weight_K: Tensor, shared: Tensor) -> Tensor:
    """Return Δ [m, n] after `steps` optimiser steps."""
    import torch

    delta = torch.nn.Parameter(torch.zeros(tensor.shape))
    optimizer = torch.optim.Adam([delta], lr=float(tensor.values["learning_rate"]))
    factor = weight_K.sum()
    # eₖᵢ at Δ = 0: ⟨τₖᵢ, τₖᵢ⟩ − ⟨τₖᵢ, Σₗ λₗ·τₗᵢ⟩
    merged = (weight_K @ tau_mKn).unsqueeze(2)
    at_zero_mK1 = tau_mKn.square().sum(dim=2, keepdim=True) - tau_mKn @ merged
    for _ in range(int(tensor.values["steps"])):
        error_mK1 = at_zero_mK1 - factor * (tau_mKn @ delta.detach().unsqueeze(2))
        gradient = (error_mK1.transpose(1, 2) @ tau_mKn).squeeze(1).mul_(-2 * factor)
        delta.grad = gradient - shared @ (shared.T @ gradient)
        optimizer.step()
    return delta.detach()
