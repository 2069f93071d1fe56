"""Coefficients of task vectors by least squares on the outputs of a layer, and how much of the outputs they leave.

For inputs Xₖ of expert k's layer, Nₖ of them, Cₖ = XₖXₖᵀ/Nₖ, and C = Σₖ Cₖ, the objective
Σₖ ‖(Σⱼ αⱼ·τⱼ − τₖ)·Xₖ‖²_F/Nₖ is quadratic in α: A·α = b with Aᵢⱼ = tr(τᵢ·C·τⱼᵀ) and bᵢ = Σₖ tr(τᵢ·Cₖ·τₖᵀ).
Letters: K experts, O output features, I input features, R rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import torch
from torch import Tensor

from engine.methods.arithmetic.regression import layers_of
from engine.methods.arithmetic.tensor import MergeTensor
from engine.sizes import PIECE
from engine.statistics.fits import LayerFit
from engine.statistics.moments import Moments
from engine.task_vectors.kinds import TaskVector

# Reads rows `start` to `stop` of all task vectors, [K, R, I], float32.
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Projection:
    """The normal equations of the coefficients of one layer, float64. Those of several layers can be added.

    Attributes:
        matrix_KK: A.
        right_K: b.
        energy: Σₖ tr(τₖ·Cₖ·τₖᵀ), the objective at α = 0.
    """

    matrix_KK: Tensor
    right_K: Tensor
    energy: float

    def __add__(self, other: Projection) -> Projection:
        return Projection(self.matrix_KK + other.matrix_KK, self.right_K + other.right_K, self.energy + other.energy)

    def coefficients(self, ridge: float = 0.0, rcond: float = 1e-6) -> Tensor:
        """Return α [K], which minimises the objective plus ρ·‖α‖², ρ = `ridge` times the mean of A's diagonal.

        Eigenvalues of A + ρ·1 below `rcond` times the largest are left out: of equal task vectors, each has an equal
        part, and those that are zero, or of whose inputs nothing is known, have none.
        """
        ridged_KK = self.matrix_KK + ridge * self.matrix_KK.diagonal().mean() * torch.eye(len(self.right_K))
        found_K: Tensor = torch.linalg.pinv(ridged_KK, rtol=rcond, hermitian=True) @ self.right_K
        return found_K

    def residual(self, alpha_K: Tensor) -> float:
        """Return the objective at α divided by that at 0: 0 if the outputs of all experts are met, and 1 for none.

        It is 0 where no expert changes any output.
        """
        alpha_K = alpha_K.double()
        left = self.energy - 2 * alpha_K @ self.right_K + alpha_K @ self.matrix_KK @ alpha_K
        return max(0.0, float(left) / self.energy) if self.energy > 0 else 0.0

    def fit(self, ridge: float = 0.0, rcond: float = 1e-6) -> LayerFit:
        """Return the coefficients, and what they leave; see `coefficients`."""
        alpha_K = self.coefficients(ridge, rcond)
        return LayerFit(tuple(alpha_K.tolist()), self.energy, self.residual(alpha_K))


def projection_of(tensor: MergeTensor) -> Projection | None:
    """Return the normal equations of a tensor, or None if it is no layer of whose inputs an expert has moments.

    Raises:
        CheckpointError: a task vector has a NaN or infinite element, or the statistics cannot be read.
    """
    layers = layers_of(tensor)
    if not layers:
        return None
    blocks = blocks_of(tensor.shape, len(tensor.task_vectors))
    rows = rows_of(tensor.base, tensor.task_vectors)

    def checked(start: int, stop: int) -> Tensor:
        tau_KRI = rows(start, stop)
        for k, tau_RI in enumerate(tau_KRI):
            tensor.check_finite(k, tau_RI)
        return tau_KRI

    return normal_equations(checked, blocks, {layer.expert: partial(mean_gram, layer.moments) for layer in layers})


def mean_gram(moments: Callable[[], Moments]) -> Tensor:
    """Return Cₖ [I, I] of an expert's moments, which are read."""
    found = moments()
    return found.gram() / found.tokens


def blocks_of(shape: Sequence[int], experts: int) -> list[tuple[int, int]]:
    """Return first and last row (exclusive) of the parts of a matrix of which all experts' are in memory at a time."""
    size = max(1, PIECE // (shape[1] * experts))
    return [(start, min(start + size, shape[0])) for start in range(0, shape[0], size)]


def rows_of(base: Tensor, task_vectors: Sequence[TaskVector | None]) -> Rows:
    """Return a function that reads rows of the task vectors of a matrix; see `Rows`."""
    width = base.shape[1]

    def rows(start: int, stop: int) -> Tensor:
        base_N = base.reshape(-1)[start * width : stop * width].float()
        tau_KN = torch.zeros(len(task_vectors), len(base_N))
        for tau_N, task_vector in zip(tau_KN, task_vectors, strict=True):
            if task_vector is not None:
                task_vector.block(start * width, stop * width, base_N, tau_N)
        return tau_KN.view(len(tau_KN), stop - start, width)

    return rows


def normal_equations(
    rows: Rows,
    blocks: Sequence[tuple[int, int]],
    grams: Mapping[int, Callable[[], Tensor]],
    own: Rows | None = None,
) -> Projection:
    """Return the normal equations of a layer.

    Args:
        rows: Reads all task vectors; called for each block once, and once more for each Gram matrix.
        blocks: First and last row (exclusive) of what is read at a time. The sums are in their order.
        grams: Reads Cₖ [I, I], anew each time, of each expert of whose inputs there are moments; called twice.
        own: Reads the experts' own task vectors, whose outputs are to be met, where `rows` reads others (τ⊥).
    """
    # A takes the sum of the Gram matrices alone, so that it costs no more than b.
    sum_II: Tensor | None = None
    for gram in grams.values():
        sum_II = gram() if sum_II is None else sum_II.add_(gram())
    assert sum_II is not None

    def flat(tau_KRI: Tensor) -> Tensor:
        return tau_KRI.double().flatten(1)

    matrix_KK = sum((flat(tau @ sum_II) @ flat(tau).T for tau in starmap(rows, blocks)), torch.zeros(()))
    del sum_II
    right_K, energy = torch.zeros(len(matrix_KK), dtype=torch.float64), 0.0
    for k, gram in grams.items():
        gram_II = gram()
        for block in blocks:
            tau_KRI = rows(*block)
            own_RI = tau_KRI[k] if own is None else own(*block)[k]
            outputs = (own_RI @ gram_II).double().flatten()
            right_K += flat(tau_KRI) @ outputs
            energy += float(own_RI.double().flatten() @ outputs)
    return Projection((matrix_KK + matrix_KK.T) / 2, right_K, energy)
