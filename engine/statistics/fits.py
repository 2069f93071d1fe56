"""How near sums of task vectors come to the outputs of the experts' layers: coefficients, and what they leave.

The fits are computed by `engine.methods.arithmetic.projection`. Letters: K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet

# The smallest coefficient at which learning starts: σ is flat near 0 and 1.
LEAST = 0.02
# The columns of merge/layers.parquet.
FITS = pa.schema(
    [
        ("tensor", pa.string()),
        ("model", pa.string()),
        ("coefficient", pa.float64()),
        ("energy", pa.float64()),
        ("residual", pa.float64()),
    ]
)


@dataclass(frozen=True)
class LayerFit:
    """Coefficients of one layer by least squares on its outputs.

    Attributes:
        coefficients: α [K], one for each expert.
        energy: Σₖ tr(τₖ·Cₖ·τₖᵀ), by how much the experts change the layer's outputs, squared, a mean over tokens.
        residual: The share of the energy that is left with these coefficients.
    """

    coefficients: tuple[float, ...]
    energy: float
    residual: float


Fits = Mapping[str, LayerFit]
NO_FITS: Fits = MappingProxyType({})


def total_residual(fits: Fits) -> float:
    """Return the share of the energy of all layers that is left; 0 if there is none."""
    energy = sum(fit.energy for fit in fits.values())
    return sum(fit.energy * fit.residual for fit in fits.values()) / energy if energy else 0.0


def described(fits: Fits) -> str:
    """Return what the fits foretell, as a clause."""
    if not fits:
        return "no linear layer was fitted: the statistics have inputs of none"
    return (
        f"one coefficient per expert and layer keeps {1 - total_residual(fits):.1%} of what the experts change in the "
        f"outputs of {len(fits)} linear layers"
    )


def starting_coefficients(fits: Fits) -> tuple[list[float], dict[str, list[float]]]:
    """Return coefficients at which learning can start (`weight: closed_form`), within LEAST of 0 and 1.

    Returns:
        The prior of each expert, the mean over layers, and the coefficients of each layer.
    """
    each = {name: np.clip(fit.coefficients, LEAST, 1 - LEAST) for name, fit in fits.items()}
    priors = np.mean([*each.values()], axis=0).tolist() if each else []
    return priors, {name: alpha_K.tolist() for name, alpha_K in each.items()}


def write_fits(path: Path, fits: Fits, experts: Sequence[str]) -> None:
    """Write merge/layers.parquet: one row per layer and expert."""
    rows = [
        dict(zip(FITS.names, (name, model, alpha, fit.energy, fit.residual), strict=True))
        for name, fit in fits.items()
        for model, alpha in zip(experts, fit.coefficients, strict=True)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=FITS), path)
