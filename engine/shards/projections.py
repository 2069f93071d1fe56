"""How near sums of task vectors come to the outputs of the experts' layers, for the layers of a plan.

Source: per-layer least squares on outputs; see `engine.methods.arithmetic.projection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from engine.checkpoints.vocabulary import has_tokens_for_rows, is_matrix
from engine.methods.arithmetic.projection import blocks_of, mean_gram, normal_equations, rows_of
from engine.methods.closed_form import FITTED
from engine.planning.plan import Plan
from engine.shards.prepasses import Known
from engine.shards.statistics import MergeStatistics
from engine.statistics.fits import Fits, LayerFit
from engine.statistics.moments import Moments, TensorStatistics
from engine.task_vectors.streams import TaskVectors


def fit_layers(
    plan: Plan, own: TaskVectors, used: TaskVectors, statistics: MergeStatistics, names: Sequence[str]
) -> dict[str, LayerFit]:
    """Return the fit of each named tensor that is a linear layer of whose inputs an expert has moments.

    Args:
        plan: The plan.
        own: The experts' task vectors, whose outputs are to be met. The layers are fitted on the threads of its pool.
        used: The task vectors that are summed, which may be orthogonal.
        statistics: The statistics of the experts.
        names: The tensors.

    Raises:
        CheckpointError: A weight is not finite, or the statistics cannot be read.
    """

    def fit(name: str) -> LayerFit | None:
        header, experts = plan.base_header, range(len(plan.experts))
        shape = header.tensors[name].shape
        if not is_matrix(shape, has_tokens_for_rows(header, name)):
            return None
        known = {k: of for k, of in enumerate(statistics.of_experts(name, experts)) if of and of.tokens}
        if not known:
            return None
        base, grams = own.base.read(name), {k: partial(mean_gram, partial(_moments, of)) for k, of in known.items()}
        rows, outputs = (rows_of(base, streams.of(name)) for streams in (used, own))
        blocks = blocks_of(shape, len(experts))
        projection = normal_equations(rows, blocks, grams, None if used is own else outputs)
        if not projection.matrix_KK.isfinite().all():
            own.inspection(name)  # raises, and names the model
        return projection.fit()

    found = zip(names, own.pool.map(fit, names), strict=True)
    return {name: one for name, one in found if one is not None}


def known_fits(plan: Plan, known: Known) -> Fits:
    """Return the fits that the prepasses of a weight-space merge found, in the order of the plan."""
    fits = {name: fit for results in known.values() for name, fit in results.get(FITTED, {}).items()}
    return {name: fits[name] for name in plan.merged if name in fits}


def _moments(of: TensorStatistics) -> Moments:
    found = of.moments()
    assert found is not None
    return found
