"""What the methods of singular values share: the matrices of the experts, and what becomes of other tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.task_vectors import Piece

if TYPE_CHECKING:
    from engine.methods.tensor import MergeTensor
    from engine.streaming import Fill


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
