"""The runs of the driver that are no merge: statistics of models, and mixtures of experts made smaller."""

from __future__ import annotations

from cluster.compression_run import CompressionRun
from cluster.statistics_run import StatisticsRun
from engine.planning.plan import Plan


def model_run(plan: Plan) -> type[StatisticsRun] | type[CompressionRun]:
    """Return the kind of run that a plan asks for."""
    return CompressionRun if plan.config.compress is not None else StatisticsRun
