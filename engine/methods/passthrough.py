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
    """Return the tensor's `Fill`: a copy of the model, if that is read as the base, or else one pass over it."""
    from engine.task_vectors.pipeline import copy_of

    (own,) = tensor.own or [tensor.base_values or {}]
    scale = own.get("scale")
    # Without a base, the first model is read in its place, and there is no other one.
    is_base = not tensor.has_base or all(task_vector is None for task_vector in tensor.task_vectors)
    if scale is None and is_base:
        return copy_of(tensor.base)
    factor = 1.0 if scale is None else float(scale)
    return tensor.sum_of_models(0.0 if tensor.models else factor, [factor] * len(tensor.models))
