"""Eigenvectors of a large Gram matrix for its largest eigenvalues, in float32.

Letters: m rows and n columns of a matrix, r eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Smaller matrices are decomposed in float64, which takes twice the time and memory.
FLOAT32_SIDE = 512
# Eigenvectors on each side of the cut that float32 may have mixed across it, where eigenvalues are close. With 16, the
# distance to float64 is as with 128.
NEAR = 16
# Eigenvalues below this many roundings of the largest one are zero. Those of null directions were found to reach half
# a rounding (n = 1536).
ROUNDINGS = 8
# Columns of a Gram matrix that are computed at a time.
COLUMNS = 256


def add_gram(upper_nn: Tensor, tau_mn: Tensor, factor: float) -> None:
    """Add factor·τᵀτ to a matrix of which only the upper triangle counts, which takes little more than half the time.

    Elements below the diagonal are afterwards arbitrary; see `symmetric`.
    """
    for start in range(0, len(upper_nn), COLUMNS):
        own = slice(start, start + COLUMNS)
        upper_nn[own, start:].addmm_(tau_mn[:, own].T, tau_mn[:, start:], alpha=factor)


def symmetric(upper_nn: Tensor) -> Tensor:
    """Make the matrix symmetric in place, by its upper triangle, and return it."""
    return upper_nn.triu_().add_(upper_nn.triu(1).T)


def leading_eigenvectors(gram_nn: Tensor, count: Callable[[Tensor], int], least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [r], float64 and ascending, and eigenvectors [n, r], float32, of a Gram matrix in float32.

    A small matrix is decomposed in float64. A large one is in float32, and the vectors next to the cut are replaced by
    those of the matrix on their span, in float64 (Rayleigh-Ritz): of two eigenvalues that are closer than float32 can
    tell, next to the largest, a part of either vector would be cut.

    Args:
        gram_nn: The matrix, float32.
        count: Returns r, from all eigenvalues in ascending order.
        least: Smaller eigenvalues are returned as zero, as are those that may be rounding.

    Raises:
        torch.linalg.LinAlgError: The matrix is not finite.
    """
    small = len(gram_nn) < FLOAT32_SIDE
    values_n, vectors_nn = torch.linalg.eigh(gram_nn.double() if small else gram_nn)
    rounding = torch.finfo(values_n.dtype).eps
    values_n, vectors_nn = values_n.double(), vectors_nn.float()

    def counted(values: Tensor) -> Tensor:
        return torch.where(values >= max(least, ROUNDINGS * rounding * float(values[-1])), values, 0)

    cut = len(values_n) - min(len(values_n), count(counted(values_n)))
    if not small and 0 < cut < len(values_n):
        near = slice(max(0, cut - NEAR), cut + NEAR)
        span_nr = vectors_nn[:, near].double()
        values_n[near], turned = torch.linalg.eigh(span_nr.T @ (gram_nn.double() @ span_nr))
        vectors_nn[:, near] = (span_nr @ turned).float()
    return counted(values_n)[cut:], vectors_nn[:, cut:]
