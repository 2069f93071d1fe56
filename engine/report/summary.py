"""The summary of a merge: what was merged, how near the result is to each expert, and what needs attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from engine.learning.end_check import ADVICE
from engine.planning.differences import LOW, WARNING
from engine.report.merge_folder import Merged
from engine.report.parts import LOSS_NAMES, Cell, PerCent, ReportSection, Table, duration, number, share

TEXT = (
    "Distances are means over an expert's calibration samples: at the first visit of each sample in the first stage, "
    "and at its last visit in the last stage. What is left is the second in per cent of the first."
)
# What the losses measure, as the subject of a sentence.
MEASURED = {
    "kl": "the KL divergence from the experts",
    "hidden": "the hidden loss against the experts",
    "entropy": "the entropy of the merged model's predictions",
}
# Names in a sentence.
NAMES = 6


def summary(merge: Merged) -> ReportSection:
    """Return the summary of one merge."""
    distances = merge.distances()
    tables = [_table(merge, distances)] if distances else []
    tables += [_end_check(merge)] if merge.checked else []
    return ReportSection(
        "Summary", TEXT if distances else "", list(_points(merge, distances)), list(_warnings(merge, distances)), tables
    )


def _points(merge: Merged, distances: Mapping[str, Mapping[str, tuple[float, float]]]) -> Iterator[str]:
    names = [expert.name for expert in merge.config.models]
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    then = "".join(f", then {step.method}" for step in merge.config.calibrate)
    by = f"by {merge.config.merge_method}{then}"
    yield f"{', '.join(names[:NAMES])}{more} merged with {merge.config.base_model} {by}."
    for loss, by_expert in distances.items():
        starts, ends = (sum(pair[place] for pair in by_expert.values()) / len(by_expert) for place in (0, 1))
        before = f" before {merge.config.calibrate[0].method}" if merge.config.calibrate else ""
        sentence = f"On the samples{before}, {MEASURED[loss]} went from {number(starts)} to {number(ends)} in the mean"
        left = {name: _left(pair) for name, pair in by_expert.items() if math.isfinite(_left(pair))}
        if len(left) > 1:
            near, far = min(left, key=lambda name: left[name]), max(left, key=lambda name: left[name])
            sentence += f"; {share(left[near])} is left for {near}, the nearest, and {share(left[far])} for {far}"
        yield sentence + "."
    memory = merge.memory
    if memory is not None and memory.at_work is not None:
        took = f"It took {duration(memory.at_work)}"
        if len(memory.starts) > 1:
            took += f", in {len(memory.starts)} starts with {duration(memory.stopped)} in between"
        yield took + "."


def _warnings(merge: Merged, distances: Mapping[str, Mapping[str, tuple[float, float]]]) -> Iterator[str]:
    for loss, by_expert in distances.items():
        name = LOSS_NAMES[loss]
        broken = [expert for expert, pair in by_expert.items() if not all(map(math.isfinite, pair))]
        if broken:
            yield f"The {name} is not a finite number for {', '.join(broken)}."
        farther = [expert for expert, pair in by_expert.items() if pair[1] > pair[0]]
        if farther:
            yield (
                f"The {name} of {', '.join(farther)} is larger at the end than at the start: more samples, a larger "
                "`loss_weight` of these experts or a smaller `learning_rate` may help."
            )
    yield from (f"{line}." for line in (*(merge.memory.doubts if merge.memory else ()), *merge.doubts))
    for one in merge.checked:
        if one.is_lost:
            part = share(one.removed)
            yield f"{one.model} is lost: the merge removed {part} of its KL divergence from the base; {ADVICE}."
    survived = merge.survived
    kept = 1.0 if survived is None or survived.survived is None else survived.survived
    if survived is not None and kept < LOW and survived.rounding != "stochastic":
        yield (
            f"Rounding to the output's dtype keeps {share(kept)} of what the merge changes in the base: `out_dtype: "
            "float32` keeps all of it, `rounding: stochastic` all of it on average."
        )
    if merge.memory is None:
        return
    for expert, outside in merge.memory.left_out.items():
        if outside > WARNING:
            yield (
                f"About {share(outside)} of the squared change of {expert} is in tensors that are not merged, so the "
                "merged model lacks it; see `exclude`."
            )
    if merge.memory.decompositions_by_lapack:
        yield (
            f"Matrix products did not converge for {merge.memory.decompositions_by_lapack:,} matrices, which LAPACK "
            "decomposed: this is slower, and the result is as good."
        )
    if merge.memory.not_deterministic:
        yield (
            f"Not deterministic on these GPUs: {', '.join(merge.memory.not_deterministic)}. Another run may differ in "
            "the last bits."
        )
    if merge.memory.lost_attempts:
        lost = merge.memory.lost_attempts
        yield f"Processes or nodes were lost {'once' if lost == 1 else f'{lost} times'} in the last start; it went on."


def _table(merge: Merged, distances: Mapping[str, Mapping[str, tuple[float, float]]]) -> Table:
    nothing = (float("nan"), float("nan"))
    rows: list[list[Cell]] = []
    for expert in merge.config.models:
        row: list[Cell] = [expert.name]
        for by_expert in distances.values():
            pair = by_expert.get(expert.name, nothing)
            row += [PerCent(_left(pair)), *pair]
        rows.append(row)
    head = [f"{LOSS_NAMES[loss]}, {when}" for loss in distances for when in ("left", "start", "end")]
    return Table(rows, ["expert", *head], explain=True)


def _end_check(merge: Merged) -> Table:
    before = f", before {merge.config.calibrate[0].method}" if merge.config.calibrate else ""
    rows = [(one.model, PerCent(one.removed), one.base, one.merged) for one in merge.checked]
    head = ["expert", "removed", "base", "merged model"]
    return Table(rows, head, f"KL divergence from each expert on its samples{before}")


def _left(pair: tuple[float, float]) -> float:
    """Return the end of a pair as a share of its start, NaN if that is 0."""
    return pair[1] / pair[0] if pair[0] else float("nan")
