"""The sections on times, memory and traffic of a merge."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from rich.filesize import decimal

from engine.report import charts
from engine.report.memory_file import Memory
from engine.report.parts import Chart, ReportSection, Table, duration


def times(memory: Memory) -> ReportSection:
    """Return the section of times: each phase, and when it was at work, over all starts of the run."""
    if not memory.starts:
        rows = [(name, duration(seconds)) for name, seconds in memory.seconds.items()]
        return ReportSection("Times", "The phases of the last start of the run. They overlap.", tables=[Table(rows)])
    # Seconds at work before each start: the time in which nothing ran is left out.
    before = [0.0, *accumulate(start.seconds for start in memory.starts)]
    spans = [
        (phase.name, at + phase.begin, at + phase.end)
        for at, start in zip(before, memory.starts, strict=False)
        for phase in start.phases
    ]
    names = list(dict.fromkeys(name for name, _, _ in spans))
    parts = {name: [end - begin for of, begin, end in spans if of == name] for name in names}
    rows = [(name, duration(sum(of)) + (f", in {len(of)} parts" if len(of) > 1 else "")) for name, of in parts.items()]
    begins, ends = (np.array([span[place] for span in spans], dtype=np.float64) for place in (1, 2))
    texts = [f"{duration(end - begin)}, from {duration(begin)} on" for _, begin, end in spans]
    figure = charts.spans([name for name, _, _ in spans], begins, ends, texts, before[1:-1])
    text = f"The merge was at work for {duration(before[-1])}. Phases overlap, so their times do not add up to it."
    if len(memory.starts) > 1:
        text += (
            f" The run was started {len(memory.starts)} times and stood still for {duration(memory.stopped)} in "
            "between, which is not counted. Dotted lines mark the starts."
        )
    return ReportSection("Times", text, tables=[Table(rows)], charts=[Chart("When each phase was at work", figure)])


def memory_and_traffic(memory: Memory) -> ReportSection:
    """Return the section of peak memory by process, and of the bytes moved."""
    roles = [actor.role for actor in memory.actors]
    if len(set(roles)) < len(roles):
        roles = [f"{actor.role}, process {actor.pid}" for actor in memory.actors]
    peaks = np.array([actor.peak_anonymous_bytes for actor in memory.actors], dtype=np.float64)
    sizes = [decimal(actor.peak_anonymous_bytes) for actor in memory.actors]
    figure = charts.bars({"memory": peaks / 1e9}, roles, "GB", sizes, flat=True)
    rows = [
        ("from trainer to shards", decimal(memory.bytes_trainer_to_shards)),
        ("from shards to trainer", decimal(memory.bytes_shards_to_trainer)),
        ("merged tensors, one copy", decimal(memory.bytes_merged)),
        ("targets", decimal(memory.bytes_targets)),
        ("forward passes of experts", f"{memory.expert_forwards:,}"),
    ]
    return ReportSection("Memory and traffic", tables=[Table(rows)], charts=[Chart("Peak anonymous memory", figure)])
