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

from engine.methods.arithmetic.regression import Layer, layers_of
from engine.methods.arithmetic.tensor import MergeTensor
from engine.sizes import PIECE

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


def projection_of(tensor: MergeTensor) -> Projection | None:
    """Return the normal equations of a tensor, or None if it is no layer of whose inputs an expert has moments.

    Raises:
        CheckpointError: a task vector has a NaN or infinite element, or the statistics cannot be read.
    """
    layers = layers_of(tensor)
    if not layers:
        return None
    width = tensor.shape[1]

    def rows(start: int, stop: int) -> Tensor:
        base_N = tensor.base.reshape(-1)[start * width : stop * width].float()
        tau_KN = torch.zeros(len(tensor.task_vectors), len(base_N))
        for k, task_vector in enumerate(tensor.task_vectors):
            if task_vector is not None:
                task_vector.block(start * width, stop * width, base_N, tau_KN[k])
                tensor.check_finite(k, tau_KN[k])
        return tau_KN.view(len(tau_KN), stop - start, width)

    def gram(layer: Layer) -> Tensor:
        moments = layer.moments()
        return moments.gram() / moments.tokens

    size = max(1, PIECE // (width * len(tensor.task_vectors)))
    blocks = [(start, min(start + size, tensor.shape[0])) for start in range(0, tensor.shape[0], size)]
    return normal_equations(rows, blocks, {layer.expert: partial(gram, layer) for layer in layers})


def normal_equations(
    rows: Rows, blocks: Sequence[tuple[int, int]], grams: Mapping[int, Callable[[], Tensor]]
) -> Projection:
    """Return the normal equations of a layer.

    Args:
        rows: Reads all task vectors; called for each block once, and once more for each Gram matrix.
        blocks: First and last row (exclusive) of what is read at a time. The sums are in their order.
        grams: Reads Cₖ [I, I] of each expert of whose inputs there are moments; called twice.
    """
    # A takes the sum of the Gram matrices alone, so that it costs no more than b.
    sum_II: Tensor | None = None
    for gram in grams.values():
        sum_II = gram() if sum_II is None else sum_II + gram()
    assert sum_II is not None

    def flat(tau_KRI: Tensor) -> Tensor:
        return tau_KRI.double().flatten(1)

    matrix_KK = sum((flat(tau @ sum_II) @ flat(tau).T for tau in starmap(rows, blocks)), torch.zeros(()))
    del sum_II
    right_K, energy = torch.zeros(len(matrix_KK), dtype=torch.float64), 0.0
    for k, gram in grams.items():
        gram_II = gram()
        for tau_KRI in starmap(rows, blocks):
            products_K = flat(tau_KRI) @ (tau_KRI[k] @ gram_II).double().flatten()
            right_K += products_K
            energy += float(products_K[k])
    return Projection((matrix_KK + matrix_KK.T) / 2, right_K, energy)
