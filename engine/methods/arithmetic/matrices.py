"""What the methods of singular values share: the matrices of the experts, and what becomes of other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.methods.arithmetic.tensor import MergeTensor
from engine.task_vectors.pieces import Piece
from engine.task_vectors.pipeline import Fill


def mean_of_task_vectors(tensor: MergeTensor) -> Fill:
    """θ₀ + (λ/K)·Σₖ τₖ: what the published codes do with tensors that are no matrices."""
    experts = len(tensor.task_vectors)
    return tensor.sum_of_task_vectors([float(tensor.values["lambda"]) / experts] * experts)


def changed(tensor: MergeTensor) -> Iterator[Tensor]:
    """τₖ of the experts that change the matrix, one after the other, [m, n] float32."""
    for k, task_vector in enumerate(tensor.task_vectors):
        if task_vector is not None and bool((whole := tensor.task_vector(k)).any()):
            yield whole


def add_to_base(tensor: MergeTensor, tau: Tensor) -> Fill:
    """θ₀ + λ·τ of a τ [m, n] that stands whole."""
    tau_N, base_N = tau.reshape(-1), tensor.base.reshape(-1)
    factor = float(tensor.values["lambda"])

    def fill(piece: Piece, out_N: Tensor) -> None:
        some = slice(piece.start, piece.stop)
        out_N.copy_(torch.add(base_N[some].float(), tau_N[some], alpha=factor))

    return fill


def leading(tau: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], Σ [r], Vᵀ [r, n] of at most `rank` leading parts: without those that are zero but for rounding."""
    import torch

    u, s, vt = torch.linalg.svd(tau, full_matrices=False)
    rank = min(rank, int((s > s[0] * max(tau.shape) * torch.finfo(s.dtype).eps).sum()))
    return u[:, :rank], s[:rank], vt[:rank]


def orthogonal_parts(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """U⊥ [m, Σr], Σ [Σr] and V⊥ᵀ [Σr, n] of several experts' parts, side by side in their order."""
    import torch

    left, values, right = zip(*parts, strict=True)
    return _nearest_orthogonal(torch.cat(left, dim=1)), torch.cat(values), _nearest_orthogonal(torch.cat(right))


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """P·Qᵀ of P·D·Qᵀ = matrix: the nearest with orthogonal columns or rows."""
    import torch

    p, _, qt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = p @ qt
    return nearest
