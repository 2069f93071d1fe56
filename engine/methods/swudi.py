"""SWUDI: the minimiser of WUDI's objective in closed form, by one eigendecomposition a matrix.

Source: SWUDI, arXiv 2606.07289. The objective Σₖ ‖(τ − τₖ)·τₖᵀ‖²_F / ‖τₖ‖²_F of WUDI (arXiv 2503.08099) is quadratic
in τ, and its gradient flow has a closed form.
Formula: C = Σₖ τₖᵀτₖ/‖τₖ‖²_F = Q·Λ·Qᵀ and D = Σₖ τₖ·τₖᵀτₖ/‖τₖ‖²_F of matrices τₖ [m, n];
τ = τ₀ + (D − τ₀·C)·Q·diag(hᵢ/λᵢ)·Qᵀ, θ = θ₀ + λ·τ. swudi: hᵢ = 1 − exp(−time·λᵢ) for the ⌈rank·n⌉ largest λᵢ, else 0,
the point that the flow reaches after `time` from τ₀. swudi_a needs neither: hᵢ = 1 for the largest λᵢ, chosen by `cut`.
Components with λᵢ below 1e-8, or so small that rounding may have made them, are left out. τ₀ is `start_scale` times
Σₖ τₖ (`start: sum`), τ̄ (`mean`), or 0 (`zero`). Tensors that are not matrices: θ₀ + (λ/K)·Σₖ τₖ.
Options: `start` (sum), `start_scale` (1.0), `lambda` (1.0); swudi `time` (300) and `rank` (0.85), the defaults of the
published code for fully fine-tuned language models; swudi_a `cut` (participation).

Each expert is read once, and memory is independent of their number. Where all experts are adapters, the n inputs are
replaced by the span of their factors, of Σₖ rₖ dimensions, which gives the same τ. Large matrices C are decomposed in
float32 (`engine.methods.arithmetic.eigen`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option

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
    footprint=Footprint(squares=5),
)

ADAPTIVE = Method(
    "swudi_a",
    "SWUDI with a number of components that follows from the eigenvalues, without a time (SWUDI-A)",
    SOURCE,
    "θ = θ₀ + λ·(τ₀ + (D − τ₀·C)·Q·diag(hᵢ/λᵢ)·Qᵀ), C = Q·Λ·Qᵀ, hᵢ = 1 for the largest λᵢ",
    (CUT, START, START_SCALE, LAMBDA),
    footprint=Footprint(squares=5),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill` for swudi and swudi_a.

    Raises:
        CheckpointError: τₖ, or a factor of it, has a NaN or infinite element.
    """
    import torch

    from engine.checkpoints.vocabulary import is_matrix
    from engine.methods.arithmetic.eigen import add_gram, leading_eigenvectors, symmetric
    from engine.methods.arithmetic.matrices import LEAST, add_to_base, mean_of_task_vectors

    if not is_matrix(tensor.shape, tensor.is_vocabulary):
        return mean_of_task_vectors(tensor)
    rows, columns = tensor.shape
    basis = _span_of_adapters(tensor)
    width = columns if basis is None else basis.shape[1]
    c, d, total = torch.zeros(width, width), torch.zeros(rows, width), torch.zeros(rows, width)
    for tau in _task_vectors(tensor, basis):
        factor = 1 / float(tau.square().sum())
        # τ·τᵀτ, by the smaller of the two Gram matrices.
        if rows < width:
            d.addmm_(tau @ tau.T, tau, alpha=factor)
            add_gram(c, tau, factor)
        else:
            gram = (tau.T @ tau).mul_(factor)
            d.addmm_(tau, gram)
            c += gram
        total += tau
    start = total.mul_(_scale(tensor))
    values, vectors = leading_eigenvectors(symmetric(c), lambda values: _count(tensor, values), LEAST)
    reached = _reached(tensor, values)
    # (D − τ₀·C)·Q·diag(h/λ), as C·Q = Q·Λ.
    change = (d @ vectors).mul_((reached / values.clamp_min(LEAST)).float())
    change -= (start @ vectors).mul_(reached.float())
    tau = start.addmm_(change, vectors.T)
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


def _count(tensor: MergeTensor, values: Tensor) -> int:
    """Return how many of the largest eigenvalues count, of all of them, ascending."""
    from engine.methods.arithmetic.matrices import participation

    rows, columns = tensor.shape
    if "cut" not in tensor.values:
        return math.ceil(float(tensor.values["rank"]) * columns)
    if tensor.values["cut"] == "participation":
        return participation(values)
    stacked = len(tensor.task_vectors) * rows
    threshold = gavish_donoho(stacked, columns) * _median(values.sqrt(), min(stacked, columns))
    return int((values.sqrt() > threshold).sum())


def _reached(tensor: MergeTensor, values: Tensor) -> Tensor:
    """Return hᵢ, what the flow reaches of its end for the eigenvalues λᵢ that count; 0 where λᵢ is."""
    import torch

    if "cut" in tensor.values:
        return (values > 0).to(values.dtype)
    return -torch.expm1(-float(tensor.values["time"]) * values)


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
