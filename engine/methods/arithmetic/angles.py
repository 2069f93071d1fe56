"""The angles between the task vectors of a tensor or of its rows, and the interpolation of Model Stock by them.

Letters: R rows, N elements of a piece, B of a block, K experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.methods.arithmetic.kernels import gram
from engine.methods.arithmetic.tensor import MergeTensor
from engine.task_vectors.pieces import Piece
from engine.task_vectors.pipeline import Fill

Array = npt.NDArray[np.float64]

# As in mergekit: the least product of two lengths, and of the denominator of t.
LEAST_PRODUCT, LEAST_DENOMINATOR = 1e-6, 1e-6


def interpolations(tensor: MergeTensor, row: int) -> Array:
    """Return t of each row of `row` elements, [R], float64, from a pass over the experts."""
    experts = range(len(tensor.task_vectors))

    def products(piece: Piece) -> tuple[int, Array]:
        first, last = piece.start // row, max(piece.start, piece.stop - 1) // row
        sums_RKK = np.zeros((last - first + 1, len(experts), len(experts)))
        for start, _, _, tau_KB in tensor.blocks(piece, experts):
            gram(sums_RKK[start // row - first :], tau_KB, start % row, row)
        return first, sums_RKK

    total_RKK = np.zeros((max(1, tensor.numel // row), len(experts), len(experts)))
    for first, sums_RKK in tensor.each(products):
        total_RKK[first : first + len(sums_RKK)] += sums_RKK
    return interpolation(total_RKK)


def interpolated_rows(tensor: MergeTensor) -> Fill:
    """Return the fill of θ₀ + t·(1/K)·Σₖ τₖ with a t for each row: in one pass if a block holds whole rows."""
    row, experts = max(1, tensor.shape[-1]), range(len(tensor.task_vectors))
    t_R = None if row <= tensor.block_size(len(experts)) else interpolations(tensor, row)

    def fill(piece: Piece, out_N: Tensor) -> None:
        for start, stop, base_B, tau_KB in tensor.blocks(piece, experts):
            if t_R is None:
                sums_RKK = np.zeros(((stop - start) // row, len(experts), len(experts)))
                gram(sums_RKK, tau_KB, 0, row)
                t_B = np.repeat(interpolation(sums_RKK), row)
            else:
                t_B = t_R[np.arange(start, stop) // row]
            sum_B = tau_KB[0]
            for tau_B in tau_KB[1:]:
                sum_B += tau_B
            sum_B *= (t_B / len(experts)).astype(np.float32)
            sum_B += base_B.numpy()
            out_N[start - piece.start : stop - piece.start].copy_(torch.from_numpy(sum_B))

    return fill


def interpolation(products_RKK: Array) -> Array:
    """Return t = K·c/(1 + (K − 1)·c) [R], from the inner products ⟨τᵢ, τⱼ⟩ below and on the diagonal.

    t is 0 where the denominator is nearly 0, which is where the task vectors cancel each other.
    """
    experts = products_RKK.shape[1]
    length_RK = np.sqrt(np.diagonal(products_RKK, axis1=1, axis2=2))
    i, j = np.tril_indices(experts, -1)
    cosines = products_RKK[:, i, j] / np.maximum(length_RK[:, i] * length_RK[:, j], LEAST_PRODUCT)
    c_R = np.clip(cosines, -1, 1).mean(axis=1)
    denominator_R = 1 + (experts - 1) * c_R
    singular_R = np.abs(denominator_R) < LEAST_DENOMINATOR
    t_R: Array = np.where(singular_R, 0.0, experts * c_R / np.where(singular_R, 1.0, denominator_R))
    return t_R
