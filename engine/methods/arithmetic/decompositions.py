"""Leading singular parts and nearest partial isometries by matrix products, for matrices too large for LAPACK's speed.

Leading parts: a block Krylov space of τ·τᵀ, kept orthogonal to float32, and the Rayleigh-Ritz method in float64 (Golub
and Van Loan, Matrix Computations, 10.3; Musco and Musco, arXiv 1504.05477). Nearest isometries: the dynamically
weighted Halley iteration (Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31, 2010).

Each function returns None for a matrix for which it did not reach its accuracy; the caller then has to use LAPACK.
Letters: m rows and n columns of a matrix, m ≤ n; r rank; D dimension and b block of the Krylov space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# First dimension of the Krylov space at which convergence is tested, in multiples of r, and the largest share of m. A
# spectrum σᵢ ~ i^-0.7 needs 2.5 r to 3.5 r, one of rounding alone 5 r to 7 r.
FIRST, MOST = 2.5, 0.8
# What is added to the dimension, in multiples of r, after a test with at most this angle.
STEPS = ((2e-3, 0.5), (5e-2, 1.0), (math.inf, 1.5))
# Root mean square of the estimated angles, in radians, between the leading singular vectors and those found.
ANGLE = 3e-5
# Directions of a matrix whose singular value is at most this share of the largest are null. Measured for the parts of
# experts side by side: up to 1e-5 where two experts differ by the rounding of float32 alone, 1/(2n) and more for
# independent experts.
NULL = 1e-5
# The singular values of an ill-conditioned matrix are taken to be above this share of the largest. The few below it are
# found by `PROBES` random vectors, as those that are farther than `FAR` from 1 after all steps.
SMALLEST, FAR, PROBES = 1e-4, 1e-4, 64
# Root mean square error of the singular values of a nearest isometry, which are all one.
ISOMETRY = 5e-5
# Blocks of which half a symmetric product, or an inverse, is made.
BLOCK = 512


def leading_parts_by_products(tau: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U [m, r], Σ [r], Vᵀ [r, n] of the leading singular parts, or None if they do not converge.

    The result depends on the values of `tau` alone, for one kind of device.
    """
    if len(tau) > tau.shape[1]:
        parts = leading_parts_by_products(tau.T, rank)
        return None if parts is None else (parts[2].T, parts[1], parts[0].T)
    scale = float(tau.abs().max())
    if not 1e-30 < scale < 1e30:  # neither is NaN
        return None
    space, dimension = _Krylov(tau, scale, rank), FIRST * rank
    while dimension <= MOST * len(tau):
        space.extend(int(dimension))
        values, vectors = space.ritz()
        angle = space.angle(values, vectors)
        if angle <= ANGLE:
            return space.parts(vectors)
        dimension += next(step for largest, step in STEPS if angle <= largest) * rank
    return None


class _Krylov:
    """An orthonormal basis Q [D, m], as rows, of a Krylov space of τ·τᵀ, and Q·τ [D, n]; τ is divided by `scale`."""

    def __init__(self, tau: Tensor, scale: float, rank: int) -> None:
        self.tau, self.scale, self.rank = tau, scale, rank
        self.block = max(16, -(-rank // 8))
        # Made on the CPU, so that the values do not depend on the device.
        start = torch.randn(tau.shape[1], self.block, generator=torch.Generator().manual_seed(0))
        self.q, self.q_tau = tau.new_empty(0, len(tau)), tau.new_empty(0, tau.shape[1])
        self.next, self.rest = _orthonormal((tau @ start.to(tau)).T, self.q, self.q)

    def extend(self, dimension: int) -> None:
        """Add blocks until there are at least `dimension` rows."""
        count = max(0, -(-(dimension - len(self.q)) // self.block)) * self.block
        old = len(self.q)
        self.q = torch.cat([self.q, self.q.new_empty(count, self.q.shape[1])])
        self.q_tau = torch.cat([self.q_tau, self.q_tau.new_empty(count, self.q_tau.shape[1])])
        for first in range(old, old + count, self.block):
            last = first + self.block
            self.q[first:last] = self.next
            image = self.q_tau[first:last]
            torch.mm(self.next, self.tau, out=image)
            image /= self.scale
            new = (image @ self.tau.T) / self.scale
            # In exact arithmetic, the new block has parts in the last two blocks alone.
            self.next, self.rest = _orthonormal(new, self.q[max(0, first - self.block) : last], self.q[:last])

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the squares of the Ritz values [D], descending, and their vectors [D, D] in the basis, in float64."""
        values, vectors = torch.linalg.eigh(gram(self.q_tau.double()))
        return values.flip(0), vectors.flip(1)

    def angle(self, values: Tensor, vectors: Tensor) -> float:
        """Return the estimated root mean square of the angles to the leading singular vectors.

        The angle of one is its residual over the distance to the values that the space does not resolve, taken to be
        those below number 3r/2. The mean weighted by the squared values is looked at, too.
        """
        residuals = (self.rest.double() @ vectors[-self.block :, : self.rank]).norm(dim=0)
        leading, below = values[: self.rank], values[self.rank + self.rank // 2]
        angles = residuals / (leading - below).clamp_min(torch.finfo(torch.float64).tiny)
        # Parts that are zero by the rounding of float32 have no direction.
        least = values[0] * (max(self.tau.shape) * torch.finfo(torch.float32).eps) ** 2
        angles[(residuals <= least) & (leading <= least)] = 0
        weighted = (leading * angles.square()).sum() / leading.sum()
        return float(torch.maximum(angles.square().mean(), weighted).sqrt())

    def parts(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading parts of the matrix in the space.

        Small singular values make the rows of Wᵀ·Q·τ less orthogonal than float32: a QR decomposition of them and the
        parts of a matrix [r, r] make them so.
        """
        w = vectors[:, : self.rank].to(self.tau)
        q, rest = torch.linalg.qr((w.T @ self.q_tau).T)
        u, s, vt = torch.linalg.svd(rest.T.double())
        return self.q.T @ (w @ u.to(w)), (s * self.scale).to(w), vt.to(w) @ q.T


def _orthonormal(rows: Tensor, near: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows [b, m] orthogonal to `near`, then to the whole basis, and orthonormal; and R [b, b] of their QR.

    A block that is zero but for rounding becomes random directions outside the basis, with an R of the size of
    rounding.
    """
    rows, rest = _projected(rows, near)
    for _ in range(3):
        rows, r = _projected(rows, basis)
        rest = r @ rest
        # Rows that lost little were orthogonal to the basis up to rounding, and are now.
        if float(r.diagonal().abs().min()) > 0.5:
            break
    return rows, rest


def _projected(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr((rows - (rows @ others.T) @ others).T)
    return q.T.contiguous(), r


def nearest_isometry(rows: Tensor) -> Tensor | None:
    """Return P·Qᵀ of a matrix [m, n] = P·D·Qᵀ with m ≤ n, or None if it does not converge.

    Null directions (`NULL`) are left out; a matrix with more than a few of them does not converge.

    Each step is x·(b + a·y)/(1 + c·y), y = x², on the singular values x, by an inverse: f(M) = β·I + γ·(I + c·M)⁻¹ of
    M = X·Xᵀ. All steps but the first of an ill-conditioned matrix are taken on M alone.
    """
    square = gram(rows)
    top = _largest(square)
    if not 0 < top < math.inf:
        return None
    x, lowest, null, total = rows / math.sqrt(top), 0.1, NULL, None
    square /= top
    if not _is_positive(_shifted(square, 1, -(lowest**2))):
        # Products in float32 would add a share c·2⁻²⁴ of noise to the inverse.
        a, b, c = _halley(SMALLEST)
        inverse = inverse_of_positive(_shifted(gram(rows.double()), c / top))
        if inverse is None:
            return None
        x = _function(inverse, a, b, c).to(x) @ x
        square, lowest, null = gram(x), _mapped(SMALLEST, a, b, c), _mapped(NULL, a, b, c)
        del inverse
    for last in (False, True):
        a, b, c = _halley(lowest)
        inverse = inverse_of_positive(_shifted(square, c))
        if inverse is None:
            return None
        step = _function(inverse, a, b, c)
        total = step if total is None else symmetric(total, step)
        if not last:
            # f(M)²·M, with c·M·(I + c·M)⁻¹ = I - (I + c·M)⁻¹.
            beta, gamma = b / c, a - b / c
            square = square * beta**2 + (inverse - symmetric(inverse, inverse)) * (gamma**2 / c)
            square -= inverse * (2 * beta * gamma / c)
            square.diagonal().add_(2 * beta * gamma / c)
        lowest, null = _mapped(lowest, a, b, c), _mapped(null, a, b, c)
    assert total is not None
    return _completed((total * (2 / (1 + lowest))) @ x, null)


def _completed(x: Tensor, null: float) -> Tensor | None:
    """Return X with the few singular values made 1 that the steps have not brought there, or None if they are many.

    Their space is that of the leading eigenvectors of I - X·Xᵀ. Singular values of at most `null` become zero.
    """
    probes = torch.randn(len(x), PROBES, generator=torch.Generator().manual_seed(0)).to(x)
    if _deviation(x, probes) <= ISOMETRY:
        return x
    basis = probes
    for _ in range(4):
        basis = torch.linalg.qr(basis - x @ (x.T @ basis))[0]
    u, s, _ = torch.linalg.svd(basis.T @ x, full_matrices=False)
    far = (s - 1).abs() > FAR
    if int(far.sum()) == PROBES:
        return None
    space, s = basis @ u[:, far], s[far]
    x = x + (space * torch.where(s > null, 1 / s - 1, -1)) @ (space.T @ x)
    zero = space[:, s <= null]
    return x if _deviation(x, probes - zero @ (zero.T @ probes)) <= ISOMETRY else None


def _deviation(x: Tensor, probes: Tensor) -> float:
    """Return the estimated root mean square of σ - 1 over the singular values σ of X, near 1."""
    return float((x @ (x.T @ probes) - probes).norm() / probes.norm()) / 2


def _halley(lowest: float) -> tuple[float, float, float]:
    """Return the weights a, b, c of a step for singular values between `lowest` and 1."""
    square = lowest * lowest
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * math.sqrt(1 + d))) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def _mapped(x: float, a: float, b: float, c: float) -> float:
    return x * (a + b * x * x) / (1 + c * x * x)


def _function(inverse: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return (a + b·M)/(1 + c·M) from (I + c·M)⁻¹."""
    function = inverse * (a - b / c)
    function.diagonal().add_(b / c)
    return function


def _shifted(square: Tensor, factor: float, shift: float = 1.0) -> Tensor:
    """Return factor·M + shift·I."""
    shifted = square * factor
    shifted.diagonal().add_(shift)
    return shifted


def _largest(square: Tensor) -> float:
    """Return about the largest eigenvalue of a positive matrix, by the power method."""
    vectors = torch.randn(len(square), 8, generator=torch.Generator().manual_seed(1)).to(square)
    for _ in range(12):
        vectors = square @ vectors
        lengths = vectors.norm(dim=0)
        vectors = vectors / lengths
    return float(lengths.max())


def _is_positive(matrix: Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(matrix)[1]) == 0


def gram(rows: Tensor) -> Tensor:
    """Return A·Aᵀ [m, m] of A [m, n]."""
    return symmetric(rows, rows.T)


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    """Return a·b [m, m], which must be symmetric; half of it is computed."""
    if len(a) <= BLOCK:
        return a @ b
    product, size = a.new_empty(len(a), len(a)), max(BLOCK // 2, -(-len(a) // 8))
    for first in range(0, len(a), size):
        last = min(len(a), first + size)
        torch.mm(a[first:last], b[:, :last], out=product[first:last, :last])
        product[:first, first:last] = product[first:last, :first].T
    return product


def inverse_of_positive(matrix: Tensor) -> Tensor | None:
    """Return the inverse [m, m] of a positive definite matrix, or None if it is not positive definite.

    By halves and Schur's complement: half the operations of a product [m, m]·[m, m].
    """
    if len(matrix) <= BLOCK:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return None if int(info) else torch.cholesky_inverse(factor)
    half = len(matrix) // 2
    first, other = inverse_of_positive(matrix[:half, :half]), matrix[:half, half:]
    if first is None:
        return None
    solved = first @ other
    last = inverse_of_positive(matrix[half:, half:] - symmetric(other.T, solved))
    if last is None:
        return None
    inverse = torch.empty_like(matrix)
    corner = inverse[:half, half:]
    torch.mm(solved, last, out=corner).neg_()
    inverse[half:, :half], inverse[half:, half:] = corner.T, last
    inverse[:half, :half] = first - symmetric(corner, solved.T)
    return inverse
