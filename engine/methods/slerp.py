"""SLERP: spherical linear interpolation between the base and one model.

Source: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985, with the semantics of mergekit 0.1.5.
Formula: θ = sin((1 − t)·φ)/sin φ · θ₀ + sin(t·φ)/sin φ · θ₁, where φ is the angle between θ₀ and θ₁ as vectors.
Tensors that point in nearly the same or the opposite direction are interpolated linearly: θ = (1 − t)·θ₀ + t·θ₁.
Options: `t` (required).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.methods.options import Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pieces import Piece
    from engine.task_vectors.pipeline import Fill


METHOD = Method(
    "slerp",
    "spherical interpolation between the base and one model",
    "Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985",
    "θ = sin((1 − t)·φ)/sin φ · θ₀ + sin(t·φ)/sin φ · θ₁, φ = ∠(θ₀, θ₁)",
    (Option("t", None, "t, from 0 (the base) to 1 (the other model)", required=True),),
    least=2,
    most=2,
)

# As in mergekit: a vector that is not longer has no direction, and vectors with a larger |cos φ| have the same line.
LEAST_LENGTH, SAME_LINE = 1e-8, 0.9995


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: a pass over both models for the angle, and one for the sum."""
    own, other = weights(cosine(tensor), float(tensor.values["t"]))
    return tensor.sum_of_models(own, [other])


def cosine(tensor: MergeTensor) -> float:
    """Return cos φ of the base and the model, 0 if one of them is zero."""
    import numpy as np

    from engine.methods.arithmetic.kernels import product

    def products(piece: Piece) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return |θ₀|², |θ₁|² and ⟨θ₀, θ₁⟩ of a piece."""
        sums = np.zeros(3)
        for _, _, base_B, tau_KB in tensor.blocks(piece, [0]):
            own_B, other_B = base_B.numpy(), tau_KB[0]
            other_B += own_B
            sums += product(own_B, own_B), product(other_B, other_B), product(own_B, other_B)
        return sums

    own, other, both = sum(tensor.each(products), start=np.zeros(3)).tolist()
    lengths = [length if length > LEAST_LENGTH else 1.0 for length in (math.sqrt(own), math.sqrt(other))]
    return max(-1.0, min(1.0, both / math.prod(lengths)))


def weights(cos: float, t: float) -> tuple[float, float]:
    """Return the factors of the base and of the model for the cosine of their angle."""
    if abs(cos) > SAME_LINE:
        return 1 - t, t
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
