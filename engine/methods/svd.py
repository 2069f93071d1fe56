"""Task singular vectors: the leading singular parts of every task vector, made orthogonal across experts (TSV-M).

Source: Gargiulo et al., Task Singular Vectors, arXiv 2412.00081 (TSV-Merge).
Formula: of each τₖ = Uₖ·Σₖ·Vₖᵀ the leading r = ⌊rank·min(m, n)⌋ parts; U = [U₁ … U_K], V = [V₁ … V_K] and their nearest
orthogonal matrices U⊥ = P·Qᵀ with P·D·Qᵀ = U, V⊥ likewise; θ = θ₀ + λ·U⊥·diag(Σ₁ … Σ_K)·V⊥ᵀ. Tensors that are
not matrices: θ₀ + (λ/K)·Σₖ τₖ.
Options: `rank` (0, which means 1/K: as many parts in total as a matrix has), `lambda` (1.0).

`svd_intermediate` writes one model per expert, θ₀ + λ·(the leading r parts of τₖ); for tensors that are not matrices,
θ₀ + λ·τₖ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


RANK = Option("rank", 0.0, "r as a fraction of min(m, n); 0 means 1/K", low=0, high=1)

SOURCE = "Gargiulo et al., Task Singular Vectors, arXiv 2412.00081"

METHOD = Method(
    "svd",
    "the leading singular parts of every task vector, made orthogonal across experts (TSV-M)",
    SOURCE,
    "θ = θ₀ + λ·U⊥·diag(Σ₁ … Σ_K)·V⊥ᵀ, of the leading parts of τₖ = Uₖ·Σₖ·Vₖᵀ",
    (RANK, LAMBDA),
    footprint=Footprint(),
)

INTERMEDIATE = Method(
    "svd_intermediate",
    "one model per expert: the base plus the leading singular parts of the expert's task vector",
    SOURCE,
    "θ⁽ᵏ⁾ = θ₀ + λ·Uₖ,ᵣ·Σₖ,ᵣ·Vₖ,ᵣᵀ",
    (RANK, LAMBDA),
    outputs="experts",
    footprint=Footprint(),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill` for svd, from the leading parts of K matrices, made orthogonal."""
    from engine.checkpoints.vocabulary import is_matrix
    from engine.methods.arithmetic.matrices import (
        add_to_base,
        changed_parts,
        mean_of_task_vectors,
        orthogonal_parts,
    )

    if not is_matrix(tensor.shape, tensor.is_vocabulary):
        return mean_of_task_vectors(tensor)
    parts = list(changed_parts(tensor, _rank(tensor, len(tensor.task_vectors))))
    if not parts:
        return mean_of_task_vectors(tensor)
    left, values, right = orthogonal_parts(parts)
    return add_to_base(tensor, (left * values) @ right)


def prepare_intermediate(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill` for the output of svd_intermediate of one expert, the only one of `tensor`."""
    from engine.checkpoints.vocabulary import is_matrix
    from engine.methods.arithmetic.matrices import add_to_base, changed_parts, mean_of_task_vectors

    assert len(tensor.task_vectors) == 1
    if not is_matrix(tensor.shape, tensor.is_vocabulary):
        return mean_of_task_vectors(tensor)
    for u, s, vt in changed_parts(tensor, _rank(tensor, tensor.experts_in_all)):
        return add_to_base(tensor, (u * s) @ vt)
    return mean_of_task_vectors(tensor)


def _rank(tensor: MergeTensor, experts: int) -> int:
    smaller, part = min(tensor.shape), float(tensor.values["rank"])
    return max(1, int(smaller * part) if part else smaller // experts)
