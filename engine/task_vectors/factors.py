"""The task vectors of all experts of a matrix as one pair of factors: their merge, and the gradient of coefficients.

τₖ = Lₖ·Vₖ with Lₖ [m, rₖ] and Vₖ [rₖ, n]. Side by side, the experts' factors are L [m, R] and V [R, n], R = Σₖ rₖ. Then
θ = θ₀ + (L∘α)·V is one product of matrices, and ⟨G, τₖ⟩ are sums over (G·Vᵀ)∘L, another one. Of orthogonal task vectors
R is at most min(m, n), however many the experts are. The functions compute on the device of their tensors.
Source: Expert Merging, arXiv 2509.25712, θₗ = θ₀,ₗ + Σₖ Σₛ αₖ,ₗ,ₛ · τₖ,ₗ,ₛ and its chain rule.
A chunk is a range of the matrix's elements, or of the experts' singular directions, the columns of L: then α scales the
columns. Letters: m rows and n columns of a matrix, R ranks of all experts, K experts, S chunks of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from engine.task_vectors.coefficients import Array, TensorCoefficients
from engine.task_vectors.kinds import Product, TaskVector


@dataclass(frozen=True)
class Factors:
    """L [m, R] and V [R, n] of a matrix, with the rank rₖ of each expert, in the order of the experts."""

    left_mR: Tensor
    right_Rn: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, products: Sequence[Product | None], shape: Sequence[int]) -> Factors:
        """Return the factors of several experts' products side by side; None is an expert with rank 0."""
        found = [product for product in products if product is not None]
        return cls(
            torch.cat([torch.empty(shape[0], 0), *(product.left for product in found)], dim=1),
            torch.cat([torch.empty(0, shape[1]), *(product.right for product in found)]),
            tuple(0 if product is None else product.left.shape[1] for product in products),
        )

    def products(self) -> list[Product | None]:
        """Return τₖ of each expert as a product of views; None for an expert with rank 0."""
        edges = pairwise(accumulate(self.ranks, initial=0))
        return [Product(self.left_mR[:, a:b], self.right_Rn[a:b]) if a < b else None for a, b in edges]

    @cached_property
    def owners_R(self) -> Tensor:
        """The expert of each rank, [R] int64, on the device of the factors. It is sent there once."""
        return torch.from_numpy(np.repeat(np.arange(len(self.ranks)), self.ranks)).to(self.left_mR.device)

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return the factors on a device, in a dtype."""
        left_mR, right_Rn = (factor.to(device, dtype, non_blocking=True) for factor in (self.left_mR, self.right_Rn))
        return Factors(left_mR, right_Rn, self.ranks)


def merge_factors(base_mn: Tensor, factors: Factors, wanted: TensorCoefficients, out_mn: Tensor) -> None:
    """Write θ = θ₀ + (L∘α)·V to `out_mn`, rounded to its dtype; all other tensors have the dtype of the computation."""
    left_mR, right_Rn, owners_R = factors.left_mR, factors.right_Rn, factors.owners_R
    if wanted.spectral:
        alpha_R = [wanted.of_directions(k, rank) for k, rank in enumerate(factors.ranks)]
        scaled_mR = left_mR * torch.from_numpy(np.concatenate(alpha_R)).to(left_mR.device, non_blocking=True)
        out_mn.copy_(torch.addmm(base_mn, scaled_mR.to(left_mR), right_Rn))
        return
    # In float32 at least: rounded to bfloat16, a coefficient would be off by as much in all elements.
    wide = torch.promote_types(left_mR.dtype, torch.float32)
    alpha_SR = torch.from_numpy(wanted.values.T.copy()).to(left_mR.device, wide, non_blocking=True)[:, owners_R]
    # The coefficient of a row is that of its first element; the rest of a row with a chunk's edge in it follows.
    rows = [b - a for a, b in pairwise(_first_rows(wanted.edges, base_mn.shape[1]))]
    of_rows = [alpha_R.expand(count, -1) for alpha_R, count in zip(alpha_SR, rows, strict=True)]
    scaled_mR = left_mR * (torch.cat(of_rows) if len(rows) > 1 else alpha_SR)
    merged_mn = torch.addmm(base_mn, scaled_mR.to(left_mR), right_Rn)
    for chunk, row, column in _inside_rows(wanted.edges, base_mn.shape[1]):
        change_R = left_mR[row] * (alpha_SR[chunk + 1] - alpha_SR[chunk])
        merged_mn[row, column:] += change_R.to(left_mR) @ right_Rn[:, column:]
    out_mn.copy_(merged_mn)


def project(gradient_mn: Tensor, factors: Factors, edges: tuple[int, ...]) -> Tensor:
    """Return ⟨Gₛ, τₖ,ₛ⟩, [K, S] float64, for G = ∂L/∂θ in the dtype of the computation.

    `edges` are those of the matrix's S chunks. Products are summed over the rows of a chunk in float64.
    """
    left_mR, right_Rn, columns = factors.left_mR, factors.right_Rn, gradient_mn.shape[1]
    products_mR = (gradient_mn @ right_Rn.T).mul_(left_mR)
    starts = pairwise(_first_rows(edges, columns))
    sums_SR = torch.stack([products_mR[a:b].sum(dim=0, dtype=torch.float64) for a, b in starts])
    for chunk, row, column in _inside_rows(edges, columns):
        rest_R = ((right_Rn[:, column:] @ gradient_mn[row, column:]) * left_mR[row]).double()
        sums_SR[chunk] -= rest_R
        sums_SR[chunk + 1] += rest_R
    experts_K1 = torch.arange(len(factors.ranks), device=sums_SR.device)[:, None]
    return (factors.owners_R == experts_K1).to(sums_SR) @ sums_SR.T


def project_directions(gradient_mn: Tensor, factors: Factors) -> Tensor:
    """Return ⟨G, τᵣ⟩ of each singular direction r of all experts, [R] float64; otherwise as `project`."""
    return (gradient_mn @ factors.right_Rn.T).mul_(factors.left_mR).sum(dim=0, dtype=torch.float64)


def sum_directions(products_R: Array, ranks: Sequence[int], edges: tuple[int, ...]) -> Array:
    """Return the sums over chunks of singular directions, [K, S], from `project_directions`.

    An expert has no directions, and a sum of 0, beyond its rank.
    """
    padded_Kr = np.zeros((len(ranks), edges[-1]))
    for k, (a, b) in enumerate(pairwise(accumulate(ranks, initial=0))):
        padded_Kr[k, : b - a] = products_R[a:b]
    return np.add.reduceat(padded_Kr, edges[:-1], axis=1)


def scaled_products(task_vectors: Sequence[TaskVector | None], wanted: TensorCoefficients) -> list[TaskVector | None]:
    """Return Σᵣ αₖ,ᵣ · τₖ,ᵣ of each expert, from products whose columns are singular directions."""
    scaled: list[TaskVector | None] = []
    for k, product in enumerate(task_vectors):
        assert product is None or isinstance(product, Product)
        alpha = None if product is None else torch.from_numpy(wanted.of_directions(k, product.left.shape[1]))
        scaled.append(None if product is None else Product(product.left, product.right, alpha))
    return scaled


def _first_rows(edges: tuple[int, ...], columns: int) -> list[int]:
    """Return the first row that starts in each chunk, followed by the number of rows."""
    return [-(-edge // columns) for edge in edges]


def _inside_rows(edges: tuple[int, ...], columns: int) -> Iterator[tuple[int, int, int]]:
    """Yield each edge that is not at the start of a row: the chunk before it, its row and its column."""
    for chunk, edge in enumerate(edges[1:-1]):
        row, column = divmod(edge, columns)
        if column:
            yield chunk, row, column
