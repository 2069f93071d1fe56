"""Regression of a layer's weight on the outputs of several experts: one solver for all methods that fit layers.

For inputs Sₖ that the merged layer sees, inputs Tₖ and weights Wₖ of expert k, factors cₖ and a ridge ρ to an anchor A,

    W* = argmin Σₖ cₖ·‖W·Sₖ − Wₖ·Tₖ‖²_F + ρ·‖W − A‖²_F   solves   W*·(Σₖ cₖ·SₖSₖᵀ + ρ·1) = Σₖ cₖ·Wₖ·TₖSₖᵀ + ρ·A.

It is solved for W* − A, so that a direction of inputs that no sample has leaves the anchor as it is.
Letters: O output features, I input features, N samples of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.checkpoints.vocabulary import is_matrix
from engine.methods.arithmetic.tensor import MergeTensor
from engine.statistics.moments import Moments, TensorStatistics

# Eigenvalues of a Gram matrix below this share of the largest are zero by the rounding of float32, in which it is kept.
ROUNDING = torch.finfo(torch.float32).eps
# Up to this condition number, the solution has four digits in float32.
WELL_CONDITIONED = 1e3
# Vectors and steps of the power iterations that estimate a condition number.
PROBES, STEPS = 8, 6
# Rows that are multiplied and divided at a time, so that copies in float64 are small.
ROWS = 512


@dataclass(frozen=True)
class Layer:
    """A layer of one expert. Its tensors are read anew each time: memory is independent of the number of experts.

    Attributes:
        expert: k.
        weight: Returns Wₖ [O, I].
        moments: Returns the moments of the layer's inputs, Gram matrix or inputs included.
    """

    expert: int
    weight: Callable[[], Tensor]
    moments: Callable[[], Moments]


def layers_of(tensor: MergeTensor, of_weights: bool = False) -> list[Layer]:
    """Return the layers of the experts of whose inputs there are moments, with τₖ as weights, or θₖ (`of_weights`).

    None of a tensor that is not a linear layer's matrix, and none of embedding and head.
    """
    if not is_matrix(tensor.shape, tensor.is_vocabulary):
        return []
    return [
        Layer(k, partial(_weight, tensor, k, of_weights), partial(_moments, of))
        for k, of in enumerate(tensor.statistics)
        if of is not None and of.tokens
    ]


def _weight(tensor: MergeTensor, k: int, of_weights: bool) -> Tensor:
    tau = tensor.task_vector(k)
    return tau.add_(tensor.base) if of_weights else tau


def _moments(of: TensorStatistics) -> Moments:
    moments = of.moments()
    assert moments is not None
    return moments


def regress(
    layers: Sequence[Layer],
    *,
    per_token: bool = False,
    off_diagonal: float = 1.0,
    ridge: float = 0.0,
    rcond: float = ROUNDING,
) -> Tensor:
    """Return argmin Σₖ cₖ·‖(W − Wₖ)·Xₖ‖²_F + ρ·‖W‖²_F [O, I], float32, for the inputs Xₖ that the experts saw.

    Where all moments hold the inputs, and these are fewer than I, an equation of their number is solved instead of one
    of I inputs. Otherwise, an expert's Gram matrix is read twice: for the sum, and for the right side, which is summed
    in the precision that the condition of the sum asks for.

    Args:
        layers: At least one.
        per_token: cₖ = 1/Nₖ instead of 1.
        off_diagonal: Factor of the elements of the Gram matrices that are not on their diagonals.
        ridge: ρ as a multiple of the mean of the diagonal of Σₖ cₖ·XₖXₖᵀ.
        rcond: See `Inverse`; only without a ridge.
    """
    rcond = ROUNDING if ridge else rcond
    samples = _few_samples(layers, per_token) if off_diagonal == 1 else None
    if samples is not None:
        # In float64: samples that begin alike have equal inputs, and the matrix of their products is singular.
        all_NI = torch.cat(samples).double()
        inverse = Inverse(all_NI @ all_NI.T, ridge * float(all_NI.square().sum()) / all_NI.shape[1], rcond)
        parts = [
            layer.weight().to(inverse.dtype) @ x_NI.T.to(inverse.dtype)
            for layer, x_NI in zip(layers, samples, strict=True)
        ]
        # The parts of equal inputs are large and cancel out.
        divided_ON = inverse.divide(torch.cat(parts, dim=1), torch.float64)
        return (divided_ON @ all_NI).float()

    def gram(layer: Layer) -> Tensor:
        moments = layer.moments()
        gram_II = moments.gram() / moments.tokens if per_token else moments.gram()
        if off_diagonal == 1:
            return gram_II
        return (gram_II * off_diagonal).diagonal_scatter(gram_II.diagonal())

    sum_II = gram(layers[0]).double()
    for layer in layers[1:]:
        sum_II += gram(layer)
    sum_II.diagonal().add_(ridge * sum_II.diagonal().mean())
    inverse = Inverse(sum_II, rcond=rcond)
    del sum_II
    right_OI: Tensor | None = None
    for layer in layers:
        weight_OI = layer.weight()
        if right_OI is None:
            right_OI = torch.zeros(weight_OI.shape, dtype=inverse.dtype)
        _add_product(right_OI, weight_OI, gram(layer).to(inverse.dtype))
    assert right_OI is not None
    return inverse.divide(right_OI)


def _add_product(sum_OI: Tensor, weight_OI: Tensor, gram_II: Tensor) -> None:
    """Add weight·gram to a sum in its dtype, some rows at a time."""
    for part_RI, rows_RI in zip(torch.split(sum_OI, ROWS), torch.split(weight_OI, ROWS), strict=True):
        part_RI.addmm_(rows_RI.to(sum_OI.dtype), gram_II)


def _few_samples(layers: Sequence[Layer], per_token: bool) -> list[Tensor] | None:
    """Return √cₖ·Xₖᵀ [Nₖ, I] of each layer if they are known and fewer than I in all, else None."""
    found, count = [], 0
    for layer in layers:
        moments = layer.moments()
        if moments.inputs_NI is None:
            return None
        count += moments.tokens
        if count >= moments.inputs_NI.shape[1]:
            return None
        found.append(moments.inputs_NI / moments.tokens**0.5 if per_token else moments.inputs_NI)
    return found


def solve(
    numerator_OI: Tensor,
    gram_II: Tensor,
    ridge: float = 0.0,
    anchor_OI: Tensor | None = None,
    rcond: float = ROUNDING,
) -> Tensor:
    """Return W* [O, I], float32, of W*·(gram + ridge·1) = numerator + ridge·anchor.

    Args:
        numerator_OI: Σₖ cₖ·Wₖ·TₖSₖᵀ.
        gram_II: Σₖ cₖ·SₖSₖᵀ, symmetric.
        ridge: ρ, not negative.
        anchor_OI: A; None for zeros.
        rcond: See `Inverse`.
    """
    inverse = Inverse(gram_II, ridge, rcond)
    if anchor_OI is None:
        return inverse.divide(numerator_OI)
    right_OI = numerator_OI.to(inverse.dtype, copy=True)
    _add_product(right_OI, -anchor_OI, gram_II.to(inverse.dtype))
    return anchor_OI.float() + inverse.divide(right_OI)


class Inverse:
    """The inverse of gram + ridge·1: a Cholesky factor, or the pseudo-inverse of a matrix that is singular.

    The factor is float32 if the matrix is well conditioned, else float64. Where its condition number is above 1/rcond,
    it is the pseudo-inverse, which leaves out the eigenvalues below rcond times the largest; up to there, the two are
    the same. The condition number is estimated by power iterations with fixed vectors.

    Args:
        gram_II: A positive semidefinite matrix.
        ridge: Not negative.
        rcond: The least share of the largest eigenvalue that counts.

    Attributes:
        dtype: The dtype of the inverse. Right sides should be summed in it.
    """

    def __init__(self, gram_II: Tensor, ridge: float = 0.0, rcond: float = ROUNDING) -> None:
        limit = 1 / max(rcond, ROUNDING)
        self.dtype = torch.float32
        self._factor_II = _factor(_ridged(gram_II, ridge, torch.float32), min(WELL_CONDITIONED, limit))
        if self._factor_II is not None:
            return
        self.dtype = torch.float64
        ridged_II = _ridged(gram_II, ridge, torch.float64)
        self._factor_II = _factor(ridged_II, limit)
        if self._factor_II is None:
            values_I, self._vectors_II = torch.linalg.eigh(ridged_II)
            kept_I = (values_I > 0) & (values_I >= values_I[-1] / limit)
            self._inverse_I = torch.where(kept_I, 1 / values_I, 0)

    @property
    def is_pseudo(self) -> bool:
        """Whether it is the pseudo-inverse."""
        return self._factor_II is None

    def divide(self, right_OI: Tensor, out: torch.dtype = torch.float32) -> Tensor:
        """Return right·(gram + ridge·1)⁻¹ [O, I] in the dtype `out`, computed in `dtype`, some rows at a time."""
        found_OI = torch.empty(right_OI.shape, dtype=out)
        for found_RI, right_RI in zip(torch.split(found_OI, ROWS), torch.split(right_OI, ROWS), strict=True):
            right_RI = right_RI.to(self.dtype)
            if self._factor_II is None:
                found_RI.copy_((right_RI @ self._vectors_II * self._inverse_I) @ self._vectors_II.T)
            else:
                found_RI.copy_(torch.cholesky_solve(right_RI.T, self._factor_II).T)
        return found_OI


def _ridged(gram_II: Tensor, ridge: float, dtype: torch.dtype) -> Tensor:
    """Return gram + ridge·1 in a dtype; the Gram matrix itself if that is the same."""
    if not ridge:
        return gram_II.to(dtype)
    ridged_II = gram_II.to(dtype, copy=True)
    ridged_II.diagonal().add_(ridge)
    return ridged_II


def _factor(matrix_II: Tensor, highest: float) -> Tensor | None:
    """Return the Cholesky factor of a matrix, or None if its condition number is above `highest`."""
    factor_II, failed = torch.linalg.cholesky_ex(matrix_II)
    if failed or condition(matrix_II, factor_II) > highest:
        return None
    factor: Tensor = factor_II
    return factor


def condition(matrix_II: Tensor, factor_II: Tensor) -> float:
    """Return an estimate from below of the condition number of a positive definite matrix with this Cholesky factor.

    It is the ratio of the largest singular values of products of the matrix, and of its inverse, with a few vectors.
    """
    largest = 1.0
    for inverted in (False, True):
        generator = torch.Generator().manual_seed(0)
        probes_IP = torch.randn(len(matrix_II), min(PROBES, len(matrix_II)), generator=generator).to(matrix_II)
        norm = 0.0
        for _ in range(STEPS):
            probes_IP = torch.linalg.qr(probes_IP)[0]
            probes_IP = torch.cholesky_solve(probes_IP, factor_II) if inverted else matrix_II @ probes_IP
            if not bool(probes_IP.isfinite().all()):
                return float("inf")
            norm = float(torch.linalg.matrix_norm(probes_IP, 2))
        largest *= norm
    return largest
