"""Passthrough: one model, scaled.

Source: mergekit 0.1.5, which has no paper for it.
Formula: θ = s·θ₁. Without `scale`, the model's tensors as they are.
Options: `scale` (per model, none).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


METHOD = Method(
    "passthrough",
    "one model, scaled",
    "mergekit 0.1.5",
    "θ = s·θ₁",
    (Option("scale", None, "s, the factor of the model; none: it is copied", "model", kind=float | None),),
    base="ignored",
    most=1,
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one pass over the model."""
    if not tensor.models:  # the base alone
        scale = (tensor.base_values or {}).get("scale")
        return tensor.sum_of_models(1.0 if scale is None else float(scale), [])
    (scale,) = tensor.each_own("scale")
    return tensor.sum_of_models(0.0, [1.0 if scale is None else float(scale)])
