"""Simulate whole merges on fake GPUs with the times of the scaling model: which GPU works at what, and when.

`python benchmarks/occupancy.py docs/occupancy.png` prints the mean number of busy GPUs by phase, and draws the
picture of docs/scaling.md in a headless Chromium. Seats, waves of experts and trainers are those that a merge would
have (`arrange_trainers`). No weight is read, and the rates of GPUs are assumed (`engine/planning/costs/rates.py`).
"""

from __future__ import annotations

import heapq
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import large_models
from plotly.subplots import make_subplots
from report import console, print_table

sys.path.append(str(Path(__file__).parent / "quality"))

from picture import browser

from cluster.placement import Devices, Node, Seat, Seating, machines
from cluster.trainer_seats import arrange_trainers
from engine.config.reader import load_config
from engine.planning.costs.flops import LEADING_FLOPS, orthogonal_flops, sample_flops
from engine.planning.costs.rates import DISK, GB, GPU_DECOMPOSING, GPU_FLOPS
from engine.planning.costs.scaling import START_SECONDS, Machines, Work, predict
from engine.planning.costs.trainers import with_gradients
from engine.planning.factors import decomposed, stored_bytes
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.planning.schedule import deal
from engine.shards.parts import tensor_groups

TOKENS, SAMPLES, GPUS = 512, 8, 8
COLOURS = {
    "survey and decomposition": "#9498a0",
    "targets": "#ff725c",
    "orthogonal task vectors": "#efb118",
    "stage 1": "#4269d0",
    "stage 2": "#6cc5b0",
}


@dataclass(frozen=True)
class Span:
    """The work of a GPU on a part of a phase, in seconds from the start; `busy` is the share of it that it computes."""

    gpu: int
    phase: str
    start: float
    end: float
    busy: float = 1.0


@dataclass(frozen=True)
class Merge:
    """A merge on fake nodes of 8 GPUs."""

    plan: Plan
    nodes: Sequence[Node]
    work: Work
    layout: Seating

    @classmethod
    def of(cls, folder: Path, experts: int, nodes: int) -> Merge:
        config = large_models.write_merge(folder, large_models.SHAPES["7B"], experts)
        plan = make_plan(load_config(config), config.parent)
        there = [Node(96, GPUS, 2000 * GB, f"n{index}") for index in range(nodes)]
        tokens = [[TOKENS] * SAMPLES] * experts
        devices = Devices.of(there, plan.config, tokens)
        work = Work.of(plan.config, tokens, devices.batch_tokens)
        layout = arrange_trainers(there, plan, work, devices)
        return cls(with_gradients(plan, layout.gradients), there, work, layout)

    @property
    def machines(self) -> Machines:
        return machines(self.nodes, self.plan.config, Devices.of(self.nodes, self.plan.config))

    def gpus(self, seats: Sequence[Seat]) -> list[int]:
        """Number the GPUs of seats: on each node in order, after that of the first trainer."""
        free = {node.id: iter(range(index * GPUS, (index + 1) * GPUS)) for index, node in enumerate(self.nodes)}
        assert self.layout.trainer is not None
        next(free[self.layout.trainer.node])
        return [next(free[seat.node]) for seat in seats]

    @property
    def first(self) -> int:
        """The GPU of the first trainer."""
        assert self.layout.trainer is not None
        return GPUS * [node.id for node in self.nodes].index(self.layout.trainer.node)

    def experts(self, start: float) -> list[tuple[float, int]]:
        """Return the GPUs of the experts, each with the time from which on it is free."""
        there = self.layout.experts
        beside = there[: len(there) - self.layout.at_home]
        return [(start, gpu) for gpu in [*self.gpus(beside), *[self.first] * self.layout.at_home]]


def experts_work(merge: Merge) -> Iterator[Span]:
    """The surveys and targets; a seat that has finished one expert takes the next."""
    plan, count = merge.plan, len(merge.plan.experts)
    whole = sum(tensor.nbytes for tensor in plan.base_header.tensors.values())
    shapes = [plan.base_header.tensors[name].shape for name in decomposed(plan)]
    decomposing = LEADING_FLOPS * sum(math.prod(shape) * min(shape) for shape in shapes) / GPU_DECOMPOSING
    survey = max(whole / DISK, decomposing)  # tensors are read while others are decomposed
    targets = whole / DISK + SAMPLES * sample_flops(plan, TOKENS)[0] / GPU_FLOPS
    seats = merge.experts(START_SECONDS)
    for _ in range(count):
        start, gpu = heapq.heappop(seats)
        yield Span(gpu, "survey and decomposition", start, start + survey)
        yield Span(gpu, "targets", start + survey, start + survey + targets)
        heapq.heappush(seats, (start + survey + targets, gpu))


def isometries(merge: Merge, begin: float) -> Iterator[Span]:
    """The groups of matrices that are made orthogonal, on shards in the experts' seats."""
    plan = merge.plan
    shapes = [plan.base_header.tensors[name].shape for name in decomposed(plan)]
    leading = LEADING_FLOPS * len(plan.experts) * sum(math.prod(shape) * min(shape) for shape in shapes)
    seconds = (orthogonal_flops(plan) - leading) / GPU_DECOMPOSING + stored_bytes(plan, decomposed(plan)) / DISK
    wanted = set(decomposed(plan))
    groups = [sum(plan.numels[name] for name in group if name in wanted) for group in tensor_groups(plan)]
    seats = merge.experts(begin + START_SECONDS)
    for elements in groups:
        start, gpu = heapq.heappop(seats)
        end = start + seconds * elements / sum(groups)
        yield Span(gpu, "orthogonal task vectors", start, end)
        heapq.heappush(seats, (end, gpu))


def stage(merge: Merge, number: int, begin: float) -> Iterator[Span]:
    """The steps of a stage on all trainers, each with its share of the passes."""
    gpus = [merge.first, *merge.gpus(merge.layout.others)]
    passes = math.ceil(merge.work.passes)
    seconds = {}
    for count in {len(share) for share in deal([TOKENS] * passes, len(gpus))}:
        there = replace(merge.machines, trainers=math.ceil(passes / count))
        seconds[count] = predict(merge.plan, merge.work, there, "trainer").step.total
    step = max(seconds.values())
    for gpu, share in zip(gpus, deal([TOKENS] * passes, len(gpus)), strict=True):
        end = begin + merge.work.steps * step
        yield Span(gpu, f"stage {number}", begin, end, seconds[len(share)] / step)


def simulate(merge: Merge) -> tuple[list[Span], float]:
    """Return the spans of all GPUs, and the seconds until the output is written, in which no GPU works."""
    spans = list(experts_work(merge))
    spans += isometries(merge, max(span.end for span in spans))
    begin = max(span.end for span in spans) + START_SECONDS
    for number in range(1, merge.plan.config.stages + 1):
        spans += stage(merge, number, begin)
        begin = max(span.end for span in spans)
    whole = sum(tensor.nbytes for tensor in merge.plan.base_header.tensors.values())
    return spans, begin + whole / DISK


def occupancy(spans: Sequence[Span], end: float) -> dict[str, list[str]]:
    """Return seconds and mean number of busy GPUs of each phase, as text."""
    groups = defaultdict[str, list[Span]](list)
    for span in spans:
        both = span.phase in ("survey and decomposition", "targets")
        groups["survey, decomposition and targets" if both else span.phase].append(span)
    rows, last = {}, 0.0
    for phase, some in groups.items():
        until = max(span.end for span in some)
        busy = sum((span.end - span.start) * span.busy for span in some) / (until - last)
        rows[phase], last = [f"{until - last:.0f}", f"{busy:.1f}"], until
    rows["writing"] = [f"{end - last:.0f}", "0"]
    busy = sum((span.end - span.start) * span.busy for span in spans) / end
    return rows | {"in total": [f"{end:.0f}", f"{busy:.1f}"]}


def draw(merges: dict[str, tuple[list[Span], float]], out: Path) -> None:
    """Draw the merges below each other, one line for each GPU."""
    heights = [1 + max(span.gpu for span in spans) for spans, _ in merges.values()]
    figure = make_subplots(
        rows=len(merges), cols=1, row_heights=heights, subplot_titles=list(merges), vertical_spacing=0.09
    )
    for row, (spans, end) in enumerate(merges.values(), start=1):
        for phase, colour in COLOURS.items():
            some = [span for span in spans if span.phase == phase]
            figure.add_bar(
                x=[span.end - span.start for span in some],
                base=[span.start for span in some],
                y=[span.gpu for span in some],
                orientation="h",
                name=phase,
                marker_color=colour,
                marker_line_width=0,
                showlegend=row == 1,
                row=row,
                col=1,
            )
        figure.update_xaxes(range=[0, end], row=row, col=1)
    figure.update_yaxes(title_text="GPU", autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="seconds", row=len(merges), col=1)
    size = {"width": 1000, "height": 160 + 13 * sum(heights)}
    figure.update_layout(template="plotly_white", barmode="overlay", bargap=0.1, margin_t=40, margin_b=30, **size)
    figure.update_layout(legend_orientation="h", legend_y=-0.12)
    with browser() as started:
        page = started.new_page(viewport=size)
        page.set_content(figure.to_html(include_plotlyjs=True, full_html=True))
        page.wait_for_selector(".main-svg")
        page.locator(".plotly-graph-div").screenshot(path=out)


@click.command(help=__doc__)
@click.argument("out", required=False, type=click.Path(path_type=Path))
def main(out: Path | None) -> None:
    merges = {}
    with tempfile.TemporaryDirectory() as folder:
        for experts, nodes in ((8, 1), (32, 4)):
            merge = Merge.of(Path(folder) / str(experts), experts, nodes)
            spans, end = simulate(merge)
            merges[f"{experts} experts of 7B on {nodes * GPUS} GPUs"] = spans, end
            trainers = 1 + len(merge.layout.others)
            console.print(f"{experts} experts, {nodes * GPUS} GPUs: {len(merge.layout.experts)} experts at a time,")
            console.print(f"{trainers} trainers of {merge.work.passes:g} passes")
            print_table("simulated", ["seconds", "GPUs at work"], occupancy(spans, end))
    if out:
        draw(merges, out)


if __name__ == "__main__":
    main()
