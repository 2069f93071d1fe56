"""The end check: how far base and merged model are from the experts, and which experts the merge has lost.

Letters in array names: N samples, each with L_logit (the KL divergence, see `engine.learning.losses`) and L_hid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from engine.calibration.samples import Sample
from engine.planning.plan import Plan
from engine.task_vectors.coefficients import Array

# The columns of merge/end_check.parquet.
END_CHECK = pa.schema(
    [
        ("point", pa.string()),
        ("model", pa.string()),
        ("sample", pa.int32()),
        ("kl", pa.float64()),
        ("hidden", pa.float64()),
    ]
)
# The points: all coefficients 0, the common prior that `weight: auto` found, and the coefficients that are written.
BASE, PRIOR, MERGED = "base", "prior", "merged"
# An expert is lost if the merge removes less than this share of its KL divergence from the base.
LOST = 0.2
ADVICE = "more samples of it or a larger `loss_weight` may help; else leave it out"


@dataclass(frozen=True)
class Distance:
    """The KL divergence of the base and of the merged model from an expert, means over its samples."""

    model: str
    base: float
    merged: float

    @property
    def removed(self) -> float:
        """The share of the divergence that the merge removed: 1 − merged / base; NaN for an expert like the base."""
        return 1 - self.merged / self.base if self.base else math.nan

    @property
    def is_lost(self) -> bool:
        """Whether the merged model is hardly nearer to the expert than the base."""
        return self.removed < LOST


def end_check(losses: Mapping[str, Array], samples: Sequence[Sample], names: Sequence[str]) -> pa.Table:
    """Return the contents of merge/end_check.parquet, each sample once.

    Args:
        losses: The losses of the samples at each point, [N, 2].
        samples: The samples; one that occurs again is left out.
        names: The names of the experts.
    """
    first = {(sample.expert, sample.index): place for place, sample in reversed(list(enumerate(samples)))}
    rows = [
        dict(zip(END_CHECK.names, (point, names[k], index, *losses_N2[first[k, index]].tolist()), strict=True))
        for point, losses_N2 in losses.items()
        for k, index in sorted(first)
    ]
    return pa.Table.from_pylist(rows, schema=END_CHECK)


def distances(table: pa.Table) -> list[Distance]:
    """Return the distance of each expert that has samples at both points."""
    means = {
        point: dict(zip(rows["model"].to_pylist(), rows["kl_mean"].to_pylist(), strict=True))
        for point in (BASE, MERGED)
        for rows in [
            table.filter(pc.equal(table["point"], point))
            .group_by("model", use_threads=False)
            .aggregate([("kl", "mean")])
        ]
    }
    return [Distance(name, kl, means[MERGED][name]) for name, kl in means[BASE].items() if name in means[MERGED]]


def lost_lines(found: Sequence[Distance], plan: Plan) -> list[str]:
    """Return what to tell a user at the end of a merge: a line, and one for each expert that is lost."""
    shares = [one.removed for one in found if not math.isnan(one.removed)]
    if not shares:
        return []
    least, most = (f"{end(shares):.0%}" for end in (min, max))
    span = least if least == most else f"{least} to {most}"
    line = (
        f"{before_steps(plan)}the merge removed {span} of the KL divergence between experts and base on their samples"
    )
    lost = [one for one in found if one.is_lost]
    return [line, *(f"{one.model} is lost: the merge removed {one.removed:.0%} of it; {ADVICE}" for one in lost)]


def before_steps(plan: Plan) -> str:
    """Return the beginning of a sentence about figures that are those before the steps of `calibrate`, if any."""
    return f"before {plan.config.calibrate[0].method}, " if plan.config.calibrate else ""
