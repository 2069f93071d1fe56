"""Functions shared by the matrix methods (iso, svd, wudi, stored task vectors): singular parts and results.

Letters: m rows and n columns of a matrix, r rank, K experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from engine.methods.arithmetic.decompositions import NULL, leading_parts_by_products, nearest_isometry
from engine.methods.arithmetic.tensor import MergeTensor
from engine.sizes import ISOMETRY_SIDE, LEADING_SIDE, are_few
from engine.task_vectors.kinds import Product, TaskVector
from engine.task_vectors.pieces import Piece
from engine.task_vectors.pipeline import Fill
from engine.task_vectors.sums import whole

# U [m, r], Σ [r], Vᵀ [r, n].
Parts = tuple[Tensor, Tensor, Tensor]
# SWUDI leaves out smaller eigenvalues of C, whose trace is K.
LEAST = 1e-8


def mean_of_task_vectors(tensor: MergeTensor) -> Fill:
    """Return the fill of θ₀ + (λ/K)·Σₖ τₖ, the published codes' merge of tensors that are not matrices."""
    experts = len(tensor.task_vectors)
    return tensor.sum_of_task_vectors([float(tensor.values["lambda"]) / experts] * experts)


def changed(tensor: MergeTensor) -> Iterator[Tensor]:
    """Yield τₖ [m, n], float32, of each expert that changes the matrix."""
    for k, task_vector in enumerate(tensor.task_vectors):
        if task_vector is not None and bool((whole := tensor.task_vector(k)).any()):
            yield whole


def changed_parts(tensor: MergeTensor, rank: int) -> Iterator[Parts]:
    """Yield the `rank` leading singular parts of τₖ of each expert that changes the matrix.

    Raises:
        CheckpointError: τₖ, or a factor of it, has a NaN or infinite element.
    """
    for k, task_vector in enumerate(tensor.task_vectors):
        if isinstance(task_vector, Product):
            tensor.check_finite(k, task_vector.left)
            tensor.check_finite(k, task_vector.right)
            parts = leading_parts(task_vector, tensor.base, rank)
        else:
            parts = leading(tau, rank) if (tau := tensor.task_vector(k)).any() else None
        if parts is not None:
            yield parts


def add_to_base(tensor: MergeTensor, tau: Tensor) -> Fill:
    """Return the fill of θ₀ + λ·τ for a whole τ [m, n], float32; λ is 1 for a method without it."""
    tau_N, base_N = tau.reshape(-1), tensor.base.reshape(-1)
    factor = float(tensor.values.get("lambda", 1.0))

    def fill(piece: Piece, out_N: Tensor) -> None:
        elements = slice(piece.start, piece.stop)
        out_N.copy_(torch.add(base_N[elements].float(), tau_N[elements], alpha=factor))

    return fill


def leading_parts(
    task_vector: TaskVector | None, base: Tensor, rank: int, by_lapack: Callable[[], None] | None = None
) -> Parts | None:
    """Return the `rank` leading singular parts of an expert's matrix, or None if the expert does not change it.

    Of an adapter, the factors alone are decomposed. `by_lapack`: see `leading`.
    """
    if task_vector is None:
        return None
    if isinstance(task_vector, Product):
        parts = leading_of_product(task_vector.left, task_vector.right, rank)
        return parts if len(parts[1]) else None
    tau = whole(task_vector, base)
    return leading(tau, rank, by_lapack) if tau.any() else None


def leading(tau: Tensor, rank: int, by_lapack: Callable[[], None] | None = None) -> Parts:
    """Return U [m, r], Σ [r], Vᵀ [r, n] of the `rank` leading singular parts, less those that are zero by rounding.

    Large matrices of which few parts are wanted are decomposed by matrix products. If that does not converge,
    `by_lapack` is called, and LAPACK decomposes the matrix, as it does all others.

    Raises:
        torch.linalg.LinAlgError: `tau` is not finite.
    """
    parts = None
    if are_few(rank, tau.shape, LEADING_SIDE):
        parts = leading_parts_by_products(tau, rank)
        if parts is None and by_lapack is not None:
            by_lapack()
    u, s, vt = _by_lapack(tau) if parts is None else parts
    rank = _rank_of(s, rank, tau.shape)
    return u[:, :rank], s[:rank], vt[:rank]


def leading_of_product(left: Tensor, right: Tensor, rank: int) -> Parts:
    """Return U [m, r], Σ [r], Vᵀ [r, n], float32, of the leading singular parts of left [m, q] · right [q, n].

    From QR decompositions of the factors and the parts of a matrix [q, q], in float64. The product is never formed.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.T.double())
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rank = _rank_of(s, rank, (len(left), right.shape[1]))
    return (q_left @ u[:, :rank]).float(), s[:rank].float(), (vt[:rank] @ q_right.T).float()


def _rank_of(s: Tensor, rank: int, shape: Sequence[int]) -> int:
    """Return the number of leading singular values, at most `rank`, that are not zero by the rounding of float32."""
    return min(rank, int((s > s[0] * max(shape) * torch.finfo(torch.float32).eps).sum()))


def orthogonal_parts(parts: Sequence[Parts], by_lapack: Callable[[], None] | None = None) -> Parts:
    """Return U⊥ [m, Σr], Σ [Σr] and V⊥ᵀ [Σr, n] of several experts' parts (U, Σ, Vᵀ), concatenated in order.

    U⊥ is the orthogonal matrix nearest to [U₁ … U_K], V⊥ likewise (Gargiulo et al., arXiv 2412.00081). Where the
    experts' parts are dependent (equal experts, adapters with a common factor), it is the nearest partial isometry:
    experts share the directions that they have in common. `by_lapack` is called for each large matrix that matrix
    products do not make orthogonal; LAPACK then does.
    """
    left, values, right = zip(*parts, strict=True)
    return (
        _nearest_orthogonal(torch.cat(left, dim=1), by_lapack),
        torch.cat(values),
        _nearest_orthogonal(torch.cat(right), by_lapack),
    )


def _nearest_orthogonal(matrix: Tensor, by_lapack: Callable[[], None] | None) -> Tensor:
    """Return P·Qᵀ of matrix = P·D·Qᵀ, the nearest matrix with orthonormal columns (or rows, if it is wide).

    Null directions (`NULL`) are left out: rounding alone decides their vectors in P, so that they would add noise of
    full norm.
    """
    if min(matrix.shape) >= ISOMETRY_SIDE:
        wide = len(matrix) <= matrix.shape[1]
        found = nearest_isometry(matrix if wide else matrix.T.contiguous())
        if found is not None:
            return found if wide else found.T
        if by_lapack is not None:
            by_lapack()
    p, d, qt = _by_lapack(matrix)
    rank = int((d > NULL * d[:1]).sum())
    # Without null directions, the whole factors: a product of slices may have other bits.
    nearest: Tensor = p @ qt if rank == len(d) else p[:, :rank] @ qt[:rank]
    return nearest


def swudi_parts(parts: Sequence[Parts]) -> Parts:
    """Return U [m, Σr], Σ [Σr] and W [Σr, n], float32, of several experts' parts (U, Σ, Vᵀ), concatenated in order.

    The products τ̃ₖ = Uₖ·Σₖ·Wₖ add up to τ of SWUDI-A (arXiv 2606.07289), which is linear in the experts:
    τ̃ₖ = τₖ·(1 − C·P + Cₖ·P) with Cₖ = τₖᵀτₖ/‖τₖ‖²_F, C = Σₖ Cₖ = Q·Λ·Qᵀ and P = Q·Λ⁻¹·Qᵀ over the eigenvalues that
    count (`participation`), from τ₀ = Σₖ τₖ. On inputs in these directions τ̃ₖ answers to expert k alone; elsewhere it
    is τₖ. Equal experts get equal shares.

    With V [Σr, n] of all experts and c = Σ/‖τₖ‖_F, C = (c·V)ᵀ·(c·V) has the eigenvalues of the small matrix
    (c·V)·(c·V)ᵀ = Z·Λ·Zᵀ, and the formula becomes W = V + (c·Z·Λ⁻¹ − c⁻¹·Z)·Zᵀ·(c·V). All of it in float64.
    """
    left, values, right = zip(*parts, strict=True)
    c = torch.cat([own.double() / own.double().norm() for own in values])[:, None]
    rows = c * torch.cat(right)
    eigenvalues, z = torch.linalg.eigh(rows @ rows.T)
    counted = slice(len(eigenvalues) - participation(eigenvalues), None)
    z = z[:, counted]
    changed_rows = ((c * z / eigenvalues[counted] - z / c) @ z.T @ rows).float()
    return torch.cat(left, dim=1), torch.cat(values), torch.cat(right) + changed_rows


def participation(eigenvalues: Tensor) -> int:
    """Return how many of the largest eigenvalues count in SWUDI-A: ⌈(Σ√λᵢ)²/Σλᵢ⌉ of those from LEAST on."""
    counted = eigenvalues[eigenvalues >= LEAST]
    if not len(counted):
        return 0
    return min(len(counted), math.ceil(float(counted.sqrt().sum().square() / counted.sum())))


def _by_lapack(matrix: Tensor) -> Parts:
    """Return all singular parts of a float32 matrix. One for which LAPACK does not converge is decomposed in float64.

    Raises:
        torch.linalg.LinAlgError: The matrix is not finite.
    """
    try:
        parts: Parts = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u.to(matrix), s.to(matrix), vt.to(matrix)
    return parts
