"""SWUDI: the minimiser of WUDI's objective in closed form, by one eigendecomposition a matrix.

Source: SWUDI, arXiv 2606.07289. The objective Σₖ ‖(τ − τₖ)·τₖᵀ‖²_F / ‖τₖ‖²_F of WUDI (arXiv 2503.08099) is quadratic
in τ, and its gradient flow has a closed form.
Formula: C = Σₖ τₖᵀτₖ/‖τₖ‖²_F = Q·Λ·Qᵀ and D = Σₖ τₖ·τₖᵀτₖ/‖τₖ‖²_F of matrices τₖ [m, n];
τ = τ₀ + (D − τ₀·C)·Q·diag(hᵢ/λᵢ)·Qᵀ, θ = θ₀ + λ·τ. swudi: hᵢ = 1 − exp(−time·λᵢ) for the ⌈rank·n⌉ largest λᵢ, else 0,
the point that the flow reaches after `time` from τ₀. swudi_a needs neither: hᵢ = 1 for the largest λᵢ, chosen by `cut`.
Components with λᵢ below 1e-8 are left out. τ₀ is `start_scale` times Σₖ τₖ (`start: sum`), τ̄ (`mean`), or 0 (`zero`).
Tensors that are not matrices: θ₀ + (λ/K)·Σₖ τₖ.
Options: `start` (sum), `start_scale` (1.0), `lambda` (1.0); swudi `time` (300) and `rank` (0.85), the defaults of the
published code for fully fine-tuned language models; swudi_a `cut` (participation).

Each expert is read once, and memory is independent of their number. Where all experts are adapters, the n inputs are
replaced by the span of their factors, of Σₖ rₖ dimensions, which gives the same τ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Method, Option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

START = Option(
    "start",
    "sum",
    "τ₀: the `sum` of the task vectors, their `mean`, or `zero`",
    kind=str,
    choices=("sum", "mean", "zero"),
)
START_SCALE = Option("start_scale", 1.0, "factor of τ₀")
TIME = Option("time", 300.0, "time of the gradient flow from τ₀; 0 gives τ₀", low=0)
RANK = Option("rank", 0.85, "fraction of the n eigenvalues that count, the largest ones", low=0, high=1)
CUT = Option(
    "cut",
    "participation",
    "number of eigenvalues that count: ⌈(Σ√λᵢ)²/Σλᵢ⌉, or those above the threshold of Gavish and Donoho",
    kind=str,
    choices=("participation", "gavish_donoho"),
)
SOURCE = "SWUDI, arXiv 2606.07289"

METHOD = Method(
    "swudi",
    "WUDI's objective minimised in closed form, by one eigendecomposition a matrix",
    SOURCE,
    "θ = θ₀ + λ·(τ₀ + (D − τ₀·C)·Q·diag(hᵢ/λᵢ)·Qᵀ), C = Q·Λ·Qᵀ, hᵢ = 1 − exp(−time·λᵢ) for the largest λᵢ",
    (TIME, RANK, START, START_SCALE, LAMBDA),
    whole=True,
)

ADAPTIVE = Method(
    "swudi_a",
    "SWUDI with a number of components that follows from the eigenvalues, without a time (SWUDI-A)",
    SOURCE,
    "θ = θ₀ + λ·(τ₀ + (D − τ₀·C)·Q·diag(hᵢ/λᵢ)·Qᵀ), C = Q·Λ·Qᵀ, hᵢ = 1 for the largest λᵢ",
    (CUT, START, START_SCALE, LAMBDA),
    whole=True,
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill` for swudi and swudi_a.

    Raises:
        CheckpointError: τₖ, or a factor of it, has a NaN or infinite element.
    """
    import torch

    from engine.checkpoints.vocabulary import is_matrix
    from engine.methods.arithmetic.matrices import add_to_base, mean_of_task_vectors

    if not is_matrix(tensor.shape, tensor.is_vocabulary):
        return mean_of_task_vectors(tensor)
    rows, columns = tensor.shape
    basis = _span_of_adapters(tensor)
    width = columns if basis is None else basis.shape[1]
    c, d, total = torch.zeros(width, width), torch.zeros(rows, width), torch.zeros(rows, width)
    for tau in _task_vectors(tensor, basis):
        gram = (tau.T @ tau).div_(tau.square().sum())
        c += gram
        d.addmm_(tau, gram)
        total += tau
    start = total.mul_(_scale(tensor))
    values, vectors = torch.linalg.eigh(c.double())
    factors = _factors(tensor, values).float()
    vectors = vectors.float()
    tau = start + ((d - start @ c) @ vectors * factors) @ vectors.T
    return add_to_base(tensor, tau if basis is None else tau @ basis.T)


def _scale(tensor: MergeTensor) -> float:
    """Return the factor of Σₖ τₖ in τ₀."""
    parts = {"sum": 1.0, "mean": 1 / len(tensor.task_vectors), "zero": 0.0}
    return parts[str(tensor.values["start"])] * float(tensor.values["start_scale"])


def _task_vectors(tensor: MergeTensor, basis: Tensor | None) -> Iterator[Tensor]:
    """Yield τₖ [m, n], float32, of each expert that changes the matrix; with a basis [n, q], τₖ·basis [m, q]."""
    from engine.methods.arithmetic.matrices import changed
    from engine.task_vectors.kinds import Product

    if basis is None:
        yield from changed(tensor)
        return
    for product in tensor.task_vectors:
        if isinstance(product, Product) and bool((tau := product.left @ (product.right @ basis)).any()):
            yield tau


def _span_of_adapters(tensor: MergeTensor) -> Tensor | None:
    """Return an orthonormal basis [n, Σr] that contains the rows of all τₖ, or None if they are not low-rank products.

    Raises:
        CheckpointError: a factor has a NaN or infinite element.
    """
    import torch

    from engine.task_vectors.kinds import Product

    rows = []
    for k, task_vector in enumerate(tensor.task_vectors):
        if isinstance(task_vector, Product):
            tensor.check_finite(k, task_vector.left)
            tensor.check_finite(k, task_vector.right)
            rows.append(task_vector.right)
        elif task_vector is not None:
            return None
    if not rows or sum(map(len, rows)) >= tensor.shape[1]:
        return None
    basis: Tensor = torch.linalg.qr(torch.cat(rows).T.double())[0].float()
    return basis


def _factors(tensor: MergeTensor, values: Tensor) -> Tensor:
    """Return hᵢ/λᵢ for the eigenvalues λᵢ, ascending as `eigh` returns them."""
    import torch

    from engine.methods.arithmetic.matrices import LEAST, participation

    rows, columns = tensor.shape
    values = values.clamp_min(0)
    if "cut" not in tensor.values:
        reached = -torch.expm1(-float(tensor.values["time"]) * values)
        count = math.ceil(float(tensor.values["rank"]) * columns)
    else:
        reached = torch.ones_like(values)
        if tensor.values["cut"] == "participation":
            count = participation(values)
        else:
            stacked = len(tensor.task_vectors) * rows
            threshold = gavish_donoho(stacked, columns) * _median(values.sqrt(), min(stacked, columns))
            count = int((values.sqrt() > threshold).sum())
    kept = values >= LEAST
    kept[: max(0, len(values) - count)] = False
    return torch.where(kept, reached / values.clamp_min(LEAST), 0)


def gavish_donoho(rows: int, columns: int) -> float:
    """Return ω, so that singular values of a matrix [rows, columns] above ω times their median are no noise.

    Source: Gavish and Donoho, The Optimal Hard Threshold for Singular Values is 4/√3, arXiv 1305.5870, section 1.3.
    """
    beta = min(rows, columns) / max(rows, columns)
    return 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43


def _median(values: Tensor, count: int) -> float:
    """Return the median of the `count` largest singular values, ascending; those that are not given are zero."""
    import torch

    absent = torch.zeros(max(0, count - len(values)), dtype=values.dtype)
    return float(torch.cat([absent, values[-count:]]).median())
