"""Coefficients in closed form: per layer, those whose sum of task vectors meets the experts' outputs best.

Source: per-layer least squares on outputs, as in Etheridge et al., Model Merging by Output-Space Projection, arXiv
2605.29101. The equations here were derived from the objective, and compared with the paper's abstract alone.
Formula: with the inputs Xₖ that a linear layer of expert k saw, Nₖ of them:
α = argmin Σₖ ‖(Σⱼ αⱼ·τⱼ − τₖ)·Xₖ‖²_F/Nₖ + ρ·‖α‖², which solves (A + ρ·1)·α = b, Aᵢⱼ = tr(τᵢ·C·τⱼᵀ),
bᵢ = Σₖ tr(τᵢ·Cₖ·τₖᵀ), Cₖ = XₖXₖᵀ/Nₖ, C = Σₖ Cₖ, ρ = `ridge` times the mean of A's diagonal. θ = θ₀ + λ·Σₖ αₖ·τₖ.
Eigenvalues of A + ρ·1 below `rcond` times the largest are left out: equal experts have equal coefficients. Tensors
without samples, of which no expert has inputs, and embedding and head: θ₀ + (λ/K)·Σₖ τₖ.
Options: `ridge` (0), `rcond` (1e-6), `lambda` (1.0).

What the outputs differ by after the merge, relative to what they differ by before it, is the residual
1 − bᵀ·A⁻¹·b / Σₖ tr(τₖ·Cₖ·τₖᵀ). K coefficients a layer cannot overfit, unlike LOT's matrix; they leave a larger
residual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.methods.options import LAMBDA, Footprint, Method, Option
from engine.methods.prepass import Array, Group, Prepass
from engine.statistics.fits import LayerFit

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

RIDGE = Option("ridge", 0.0, "ρ, the pull of the coefficients to 0, as a multiple of the mean diagonal of A", low=0)
RCOND = Option("rcond", 1e-6, "eigenvalues of A + ρ·1 below this share of the largest count as zero", low=0, high=1)

METHOD = Method(
    "closed_form",
    "per layer the coefficients whose sum of task vectors has outputs nearest to the experts'",
    "as in Etheridge et al., Model Merging by Output-Space Projection, arXiv 2605.29101",
    "θ = θ₀ + λ·Σₖ αₖ·τₖ, α = argmin Σₖ ‖(Σⱼ αⱼ·τⱼ − τₖ)·Xₖ‖²_F/Nₖ",
    (RIDGE, RCOND, LAMBDA),
    footprint=Footprint(squares=7),
    statistics=("gram",),
)

# The name of the prepass, whose result is the fit of each layer.
FITTED = "fits of layers"


def fitted(tensor: MergeTensor) -> Array:
    """Return α [K], energy and residual of a layer in one array, float64; an empty one of any other tensor.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element, or the statistics cannot be read.
    """
    from engine.methods.arithmetic.projection import projection_of

    projection = projection_of(tensor)
    if projection is None:
        return np.empty(0)
    fit = projection.fit(float(tensor.values["ridge"]), float(tensor.values["rcond"]))
    return np.array([*fit.coefficients, fit.energy, fit.residual])


def fits(arrays: dict[str, Array], group: Group) -> dict[str, LayerFit]:
    """Return the fit of each layer by tensor."""
    found = {name: array.tolist() for name, array in arrays.items() if len(array)}
    return {name: LayerFit(tuple(alpha), energy, residual) for name, (*alpha, energy, residual) in found.items()}


PREPASSES = (Prepass(FITTED, "fitting layers", fitted, fits, gather=True),)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element.
    """
    from engine.methods.arithmetic.matrices import mean_of_task_vectors

    fit = tensor.known[FITTED].get(tensor.name)
    if fit is None:
        return mean_of_task_vectors(tensor)
    return tensor.sum_of_task_vectors([float(tensor.values["lambda"]) * alpha for alpha in fit.coefficients])
