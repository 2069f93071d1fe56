"""Fisher merging: a mean of the experts, weighted per element by how much the element matters to each of them.

Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832, equation 4 and section 3.4.
Formula: with the diagonal Fisher information Fₖ of expert k, F̂ₖ = Fₖ/‖Fₖ‖₂, ‖·‖₂ over all merged tensors, and element
by element: θ = θ₀ + λ·Σₖ wₖ·(F̂ₖ + floor)·τₖ / Σₖ wₖ·(F̂ₖ + floor). Tensors of which an expert has no Fisher
information: θ₀ + λ·Σₖ wₖ·τₖ / Σₖ wₖ. Elements without weights keep the base.
Options: `weight` (1.0), `floor` (1e-6), `lambda` (1.0).

With λ = 1 the base has no part in it, as in the paper. `floor` decides about elements that matter to no expert, which
get the weighted mean. Published code adds as much to Fₖ itself, so that its effect depends on the size of gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option
from engine.methods.prepass import Array, Group, Prepass

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

WEIGHT = Option("weight", 1.0, "wₖ, the factor of the expert's normalised Fisher information", "expert", low=0)
FLOOR = Option("floor", 1e-6, "what is added to the Fisher information after its division by its norm", low=0)
NORMS = "norms of the Fisher information"

METHOD = Method(
    "fisher",
    "a mean of the experts weighted per element by their Fisher information",
    "Matena and Raffel, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
    "θ = θ₀ + λ·Σₖ wₖ·F̂ₖ·τₖ / Σₖ wₖ·F̂ₖ, F̂ₖ = Fₖ/‖Fₖ‖₂ + floor",
    (WEIGHT, FLOOR, LAMBDA),
    footprint=Footprint(),
    statistics=("fisher",),
)


def squares(tensor: MergeTensor) -> Array:
    """Return the sum of the squares of each expert's Fisher information [K], float64, 0 where there is none."""
    import numpy as np

    found = (None if of is None else of.fisher() for of in tensor.statistics)
    return np.array([0.0 if fisher is None else float(fisher.double().square().sum()) for fisher in found])


def norms(sums: Array, group: Group) -> list[float]:
    """Return ‖Fₖ‖₂ of each expert."""
    return [float(total) ** 0.5 for total in sums]


PREPASSES = (Prepass(NORMS, "norms of the Fisher information", squares, norms),)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`. It sums in two arrays of the tensor's size, one expert after the other.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element, or the statistics cannot be read.
    """
    import torch

    from engine.methods.arithmetic.matrices import add_to_base

    weights = [float(weight) for weight in tensor.each_own("weight")]
    total, divisor = torch.zeros(tensor.shape), torch.zeros(tensor.shape)
    for k, (weight, norm) in enumerate(zip(weights, tensor.known[NORMS], strict=True)):
        of = tensor.statistics[k]
        fisher = None if of is None else of.fisher()
        if fisher is None:
            return tensor.sum_of_task_vectors([float(tensor.values["lambda"]) * w for w in _shares(weights)])
        factor = fisher.mul(weight / norm if norm else 0).add_(weight * float(tensor.values["floor"]))
        divisor += factor
        total.addcmul_(factor, tensor.task_vector(k))
    return add_to_base(tensor, torch.where(divisor > 0, total / divisor, 0))


def _shares(weights: list[float]) -> list[float]:
    total = sum(weights)
    return [weight / total if total else 0.0 for weight in weights]
