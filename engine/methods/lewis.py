"""LEWIS: TIES, with a density per layer and expert from how far the layer's importance moved from the base's.

Source: Chopra et al., LEWIS (LayEr WIse Sparsity), arXiv 2503.03874, and its published code.
Formula: the importance of a linear layer W with inputs x is I = ‖|W|·diag(√(mean x²))‖_F; of expert k's layer,
δₖ = |Iₖ − I₀|, with the inputs of each model itself. δₖ is divided by its mean over the layers of the same kind (name
without numbers), and the results of all layers of expert k are mapped linearly to `least_density` … `most_density`. By
these densities, the tensors are merged as by ties. Where all are equal, the density is the middle of the two; tensors
that are no linear layers, or without samples, have the expert's own `density`.
Options: `least_density` (0.5), `most_density` (0.8), and those of ties but `trim`.

The samples of the base and of the experts should be the same, or of one kind: δₖ also measures how the data differ.
Dividing by the mean instead of the sum, as the paper does, is the same where each kind is in equally many layers.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from engine.methods import ties
from engine.methods.options import DENSITY, INT8_MASK, LAMBDA, WEIGHT, Footprint, Method, Option, normalize, rescale
from engine.methods.prepass import Array, Group, Prepass

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

LEAST = Option("least_density", 0.5, "density of the layer whose importance moved least", low=0, high=1)
MOST = Option("most_density", 0.8, "density of the layer whose importance moved most", low=0, high=1)
DENSITIES = "densities"

METHOD = Method(
    "lewis",
    "TIES with densities from how far each layer's importance moved (LEWIS)",
    "Chopra et al., LEWIS, arXiv 2503.03874",
    "as ties, density of a layer: linear in |Iₖ − I₀|, I = ‖|W|·diag(√(mean x²))‖_F of its inputs x",
    (LEAST, MOST, WEIGHT, DENSITY, normalize(True), LAMBDA, rescale(False), ties.DIVIDE_BY, INT8_MASK),
    footprint=Footprint(),
    statistics=("activations",),
    base_statistics=("activations",),
)


def changes(tensor: MergeTensor) -> Array:
    """Return δₖ of each expert [K], float64; NaN where the expert or the base has no moments."""
    import numpy as np
    from torch import Tensor

    from engine.statistics.moments import TensorStatistics

    def importance(model: Tensor, of: TensorStatistics | None) -> float:
        moments = None if of is None else of.moments()
        if moments is None or not moments.tokens:
            return np.nan
        # In float64: the difference of two importances is small.
        mean_I = moments.square_I.double() / moments.tokens
        return float((model.double().square() @ mean_I).sum().sqrt())

    before = importance(tensor.base, tensor.base_statistics)
    if np.isnan(before):
        return np.full(len(tensor.models), np.nan)
    after = [importance(tensor.task_vector(k).add_(tensor.base), of) for k, of in enumerate(tensor.statistics)]
    return np.abs(np.array(after) - before)


def densities(arrays: dict[str, Array], group: Group) -> dict[str, list[float | None]]:
    """Return the density of each expert by tensor; None where it follows from no moments."""
    import numpy as np

    found: dict[str, list[float | None]] = {name: [None] * len(own) for name, own in arrays.items()}
    for k in range(group.experts):
        moved = {name: float(own[k]) for name, own in arrays.items() if not np.isnan(own[k])}
        kinds: dict[str, list[float]] = {}
        for name, delta in moved.items():
            kinds.setdefault(_kind(name), []).append(delta)
        means = {kind: float(np.mean(deltas)) for kind, deltas in kinds.items()}
        scaled = {name: delta / means[_kind(name)] if delta else 0.0 for name, delta in moved.items()}
        low, high = min(scaled.values(), default=0.0), max(scaled.values(), default=0.0)
        for name, value in scaled.items():
            share = (value - low) / (high - low) if high > low else 0.5
            least, most = (float(group.values[name][option.name]) for option in (LEAST, MOST))
            found[name][k] = least + share * (most - least)
    return found


def _kind(name: str) -> str:
    """Return a tensor's name without numbers: that of the same layer in all blocks, and in all experts of one."""
    return re.sub(r"\d+", "#", name)


PREPASSES = (Prepass(DENSITIES, "importance of layers", changes, densities, gather=True),)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`, that of ties."""
    chosen = tensor.known[DENSITIES][tensor.name]
    own = [
        values if density is None else values | {"density": density}
        for values, density in zip(tensor.own, chosen, strict=True)
    ]
    return ties.prepare(dataclasses.replace(tensor, own=own, values=tensor.values | {"trim": "tensor"}))
