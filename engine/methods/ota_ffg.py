"""OTA with FFG: a mean of the experts weighted by curvature, of the elements whose change mattered to their training.

Source: Mahdavinia et al., Harnessing Optimization Dynamics for Curvature-Informed Model Merging, arXiv 2509.11167.
Formula: with vₖ, the running mean of the squared gradients that Adam keeps (`exp_avg_sq`), element by element:
Pₖ = √vₖ; an element of expert k counts where vₖ·τₖ² is among the `density` largest of the whole expert;
θ = θ₀ + λ·Σₖ Pₖ·τₖ / Σₖ Pₖ over the experts of which the element counts; if there is none, θ₀. Tensors of which an
expert has no vₖ: θ₀ + (λ/K)·Σₖ τₖ.
Options: `density` (0.4), `lambda` (1.0).

vₖ is the Fisher information in the expert's statistics: of the state of its optimiser (`optimizer_state`) or else, as
here derived, of samples. Elements equal to the threshold all count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option
from engine.methods.prepass import selection
from engine.methods.ties import keep

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.arithmetic.selection import Counts
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

DENSITY = Option("density", 0.4, "fraction of the elements of the whole expert that count", "expert", low=0, high=1)
THRESHOLDS = "thresholds of curvature"

METHOD = Method(
    "ota_ffg",
    "a mean of the experts weighted by curvature, of the elements that mattered to their training (OTA with FFG)",
    "Mahdavinia et al., arXiv 2509.11167",
    "θ = θ₀ + λ·Σₖ √vₖ·τₖ / Σₖ √vₖ over the experts whose vₖ·τₖ² is among their `density` largest",
    (DENSITY, LAMBDA),
    footprint=Footprint(),
    statistics=("fisher",),
)


def count(tensor: MergeTensor, high: Counts | None) -> Counts:
    """Return the counts of √vₖ·|τₖ| of a tensor by one half of their bits [K, bins]; 0 where there is no vₖ."""
    import numpy as np

    from engine.methods.arithmetic.kernels import HIGH_BINS, LOW_BINS, count_high, count_low

    counts = np.zeros((len(tensor.models), HIGH_BINS if high is None else LOW_BINS), dtype=np.int64)
    for k, row in enumerate(counts):
        found = _weighted(tensor, k)
        if found is not None:
            bits_N = found[2].reshape(-1).numpy().view(np.uint32)
            count_high(bits_N, row) if high is None else count_low(bits_N, high[k], row)
        elif high is None or high[k] == 0:
            row[0] += tensor.numel
    return counts


PREPASSES = selection(THRESHOLDS, count, keep)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`. It sums in two arrays of the tensor's size, one expert after the other.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element, or the statistics cannot be read.
    """
    import torch

    from engine.methods.arithmetic.matrices import add_to_base, mean_of_task_vectors

    total, divisor = torch.zeros(tensor.shape), torch.zeros(tensor.shape)
    for k, threshold in enumerate(tensor.known[THRESHOLDS]):
        found = _weighted(tensor, k)
        if found is None:
            return mean_of_task_vectors(tensor)
        tau, root, score = found
        # For numbers that are not negative, the order of the bits is that of the numbers.
        root.mul_(score.view(torch.int32) >= threshold.bits)
        divisor += root
        total.addcmul_(root, tau)
    return add_to_base(tensor, torch.where(divisor > 0, total / divisor, 0))


def _weighted(tensor: MergeTensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return τₖ, √vₖ and √vₖ·|τₖ|, or None without vₖ. A product with roots is not below the range of float32."""
    of = tensor.statistics[k]
    fisher = None if of is None else of.fisher()
    if fisher is None:
        return None
    tau, root = tensor.task_vector(k), fisher.sqrt()
    return tau, root, root * tau.abs()
