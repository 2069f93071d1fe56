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
        ("certainty", pa.float64()),
        ("expert_certainty", pa.float64()),
    ]
)
# Those that are known at the base's point alone; the certainty is that of the model there. See `Student.measure`.
CERTAINTIES = ("certainty", "expert_certainty")
# The points: all coefficients 0, the common prior that `weight: auto` found, and the coefficients that are written.
BASE, PRIOR, MERGED = "base", "prior", "merged"
# An expert is lost if the merge removes less than this share of its KL divergence from the base.
LOST = 0.2
# An expert is broken if it has less than this share of the base's certainty, and less by MARGIN.
BROKEN, MARGIN = 0.5, 0.1
# An expert is like the base at a smaller KL divergence than SAME, or than this share of the median of the others.
SAME, NEAR = 1e-5, 0.02
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
        return 1 - self.merged / self.base if self.base >= SAME else math.nan

    @property
    def is_lost(self) -> bool:
        """Whether the merged model is hardly nearer to the expert than the base."""
        return self.removed < LOST


def end_check(losses: Mapping[str, Array], samples: Sequence[Sample], names: Sequence[str]) -> pa.Table:
    """Return the contents of merge/end_check.parquet, each sample once.

    Args:
        losses: The losses of the samples at each point, [N, 2], or [N, 4] with the certainties of model and expert.
        samples: The samples; one that occurs again is left out.
        names: The names of the experts.
    """
    first = {(sample.expert, sample.index): place for place, sample in reversed(list(enumerate(samples)))}
    rows = [
        dict(zip(END_CHECK.names, (point, names[k], index, *losses_NL[first[k, index]].tolist()), strict=False))
        for point, losses_NL in losses.items()
        for k, index in sorted(first)
    ]
    return pa.Table.from_pylist(rows, schema=END_CHECK)


def distances(table: pa.Table) -> list[Distance]:
    """Return the distance of each expert that has samples at both points."""
    base, merged = means(table, BASE, "kl"), means(table, MERGED, "kl")
    return [Distance(name, kl, merged[name]) for name, kl in base.items() if name in merged]


def preflight(table: pa.Table) -> list[str]:
    """Return what speaks against a merge before it has learned anything, as lines with the expert's name.

    An expert whose predictions have lost most of the base's certainty has broken weights; its divergence outweighs that
    of all others. One that predicts what the base predicts has no influence, as with prompts that are not its own.
    """
    kl, lines = means(table, BASE, "kl"), []
    base, own = (means(table, BASE, column) for column in CERTAINTIES)
    for name, value in kl.items():
        others = sorted(other for one, other in kl.items() if one != name)
        like_base = value < SAME or (others and value < NEAR * others[len(others) // 2])
        if own[name] < BROKEN * base[name] and base[name] - own[name] > MARGIN:
            lines.append(
                f"{name}: its predictions on its own samples are much less certain than the base's "
                f"({own[name]:.0%} of certainty, the base {base[name]:.0%}): leave it out if its weights are broken, "
                "since its losses outweigh those of the others"
            )
        elif like_base:
            lines.append(
                f"{name}: it predicts what the base predicts on its samples (KL divergence {value:.2g}), so there is "
                "little to learn from it; check that its weights and its samples are the right ones"
            )
    return lines


def means(table: pa.Table, point: str, column: str) -> dict[str, float]:
    """Return the mean of a column over the samples of each expert at a point; NaN if no sample has a value."""
    rows = table.filter(pc.equal(table["point"], point)).group_by("model", use_threads=False)
    found = rows.aggregate([(column, "mean")])
    values = (math.nan if value is None else value for value in found[f"{column}_mean"].to_pylist())
    return dict(zip(found["model"].to_pylist(), values, strict=True))


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
