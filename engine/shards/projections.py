"""How near sums of task vectors come to the outputs of the experts' layers, and the coefficients that come nearest.

Source: per-layer least squares on outputs; see `engine.methods.arithmetic.projection`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.checkpoints.vocabulary import has_tokens_for_rows, is_matrix
from engine.methods.arithmetic.projection import blocks_of, mean_gram, normal_equations, rows_of
from engine.planning.plan import Plan
from engine.shards.statistics import MergeStatistics
from engine.statistics.moments import Moments, TensorStatistics
from engine.task_vectors.streams import TaskVectors

# The smallest coefficient at which learning starts: σ is flat near 0 and 1.
LEAST = 0.02


@dataclass(frozen=True)
class LayerFit:
    """The best coefficients of one layer.

    Attributes:
        coefficients: α, one for each expert.
        energy: Σₖ tr(τₖ·Cₖ·τₖᵀ), by how much the experts change the layer's outputs, a mean over tokens.
        residual: The share of the energy that is left with the best coefficients.
    """

    coefficients: tuple[float, ...]
    energy: float
    residual: float


def fit_layers(
    plan: Plan, own: TaskVectors, used: TaskVectors, statistics: MergeStatistics, names: Iterable[str]
) -> dict[str, LayerFit]:
    """Return the fit of each named tensor that is a linear layer of whose inputs an expert has moments.

    Args:
        plan: The plan.
        own: The experts' task vectors, whose outputs are to be met.
        used: The task vectors that are summed, which may be orthogonal.
        statistics: The statistics of the experts.
        names: The tensors.
    """
    fits = {}
    header, experts = plan.base_header, range(len(plan.experts))
    for name in names:
        shape = header.tensors[name].shape
        if not is_matrix(shape, has_tokens_for_rows(header, name)):
            continue
        known = {k: of for k, of in enumerate(statistics.of_experts(name, experts)) if of and of.moments()}
        if not known:
            continue
        base, grams = own.base.read(name), {k: partial(mean_gram, partial(_moments, of)) for k, of in known.items()}
        rows, outputs = (rows_of(base, streams.of(name)) for streams in (used, own))
        projection = normal_equations(rows, blocks_of(shape, len(experts)), grams, None if used is own else outputs)
        alpha_K = projection.coefficients()
        fits[name] = LayerFit(tuple(alpha_K.tolist()), projection.energy, projection.residual(alpha_K))
    return fits


def _moments(of: TensorStatistics) -> Moments:
    found = of.moments()
    assert found is not None
    return found


def total_residual(fits: Mapping[str, LayerFit]) -> float:
    """Return the share of the energy of all layers that is left; 0 if there is none."""
    energy = sum(fit.energy for fit in fits.values())
    return sum(fit.energy * fit.residual for fit in fits.values()) / energy if energy else 0.0


def starting_coefficients(fits: Mapping[str, LayerFit]) -> tuple[list[float], dict[str, list[float]]]:
    """Return coefficients at which learning can start (`weight: closed_form`), within LEAST of 0 and 1.

    Returns:
        The prior of each expert, the mean over layers, and the coefficients of each layer.
    """
    each = {name: np.clip(fit.coefficients, LEAST, 1 - LEAST) for name, fit in fits.items()}
    priors = np.mean([*each.values()], axis=0).tolist() if each else []
    return priors, {name: alpha_K.tolist() for name, alpha_K in each.items()}
