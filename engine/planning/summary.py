"""Print the plan of a merge and its estimates as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import rich.box
import rich.console
import rich.filesize
import rich.table

from engine.checkpoints.headers import main_dtype
from engine.methods.corrections import CORRECTIONS
from engine.planning.costs.disk import DiskNeeds, DiskRoom, disk_needs, shortage
from engine.planning.costs.fitting import Role, shortages
from engine.planning.costs.flops import most_work
from engine.planning.costs.patience import patience
from engine.planning.costs.rates import GB, Prediction, Site
from engine.planning.costs.scaling import Machines, Work, choose, predict
from engine.planning.costs.trainers import settled
from engine.planning.differences import left_out, left_out_lines
from engine.planning.factors import directions, factored
from engine.planning.plan import Plan
from engine.planning.preflight import doubts

PLACES: dict[Site, str] = {
    "trainer": "within the trainer",
    "node": "actors on the trainer's node",
    "nodes": "actors on every node",
}


def print_plan(
    plan: Plan,
    tokens: Sequence[Sequence[int]],
    machines: Machines,
    out: str,
    console: rich.console.Console | None = None,
) -> Prediction:
    """Print the plan of a learned merge, and its estimated disk space, memory, traffic and time on the machines.

    Args:
        plan: The plan.
        tokens: For each expert, the approximate number of tokens of its samples.
        machines: The machines.
        out: The output folder, an absolute path or a URI.
        console: Where to print; None is stdout.

    Returns:
        The estimates for the placement that is chosen.
    """
    console = console or rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    plan, work, machines = settled(plan, tokens, machines)
    through = factored(plan, machines.gpus > 0, plan.config.cluster.factors)
    needs, room = disk_needs(plan, tokens, through), DiskRoom.of(out)
    console.print(_facts(plan, work, needs, room))
    console.print(_experts(plan, [len(counts) for counts in tokens]))
    _print_notes(console, plan)
    chosen = choose(plan, work, machines)
    places: list[Site] = ["trainer", "node", "nodes"] if machines.nodes > 1 else ["trainer", "node"]
    if plan.config.cluster.shards != "auto":
        places = [chosen.where]
    console.print(_predictions([predict(plan, work, machines, where) for where in places], chosen))
    console.print(
        f"machines: {machines.nodes} x {machines.cpus:g} CPUs, {machines.gpus:g} GPUs; memory per node: "
        f"{_gigabytes(machines.memory)}, per GPU: {_gigabytes(machines.gpu_memory)}; "
        f"about {work.tokens:.0f} tokens per sample. Times are estimates, see docs/scaling.md and `cluster.rates`"
    )
    asked = plan.config.cluster.trainers
    fewer = f" of {asked} (no more have a seat and passes)" if asked != "auto" and asked > machines.trainers else ""
    console.print(f"trainers: {machines.trainers}{fewer}, with `gradients: {plan.config.gradients}`")
    hang = patience(plan, machines, chosen.shards, work, tokens)
    console.print(f"hangs: all actors are replaced after {hang:.0f} s without a result, see `cluster.hang`")
    for role in get_args(Role):
        number = getattr(plan.config.cluster, role).num_gpus
        if number != "auto" and number > 1:
            console.print(f"{role}: {number:g} GPUs")
    for line in [*shortages(plan, work, chosen, machines), *_disk_shortages(needs, room)]:
        console.print(f"does not fit: {line}")
    return chosen


def print_weight_space_plan(plan: Plan, out: str, console: rich.console.Console | None = None) -> None:
    """Print the plan of a weight-space merge, and its disk space in the output folder, a path or a URI."""
    console = console or rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    facts = _tensors(plan)
    headers = [model.header for model in (plan.base, *plan.experts)]
    read = sum(tensor.nbytes for header in headers for tensor in header.tensors.values())
    facts.add_row("read", f"{rich.filesize.decimal(read)} of base and experts, one to three times, as the method needs")
    needs, room = disk_needs(plan), DiskRoom.of(out)
    facts.add_row("disk", _disk(needs, room))
    largest, work = most_work(plan)
    if work:
        facts.add_row(
            "memory", f"{_gigabytes(work)} for {largest}; for others at a time, up to half of a node's in all"
        )
    if plan.config.uses_samples:
        facts.add_row(
            "samples", f"at most {max(one.samples for one in plan.experts)} of each expert, which runs on them"
        )
    if plan.config.unused:
        facts.add_row("not used", ", ".join(plan.config.unused))
    for line in plan.stacked:
        facts.add_row("slice", line)
    console.print(facts)
    experts = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("expert", "given as", "parameters", "from"):
        experts.add_column(column, overflow="fold")
    recipe = plan.config.recipe
    assert recipe is not None
    for k, expert in enumerate(plan.experts):
        experts.add_row(
            expert.name, expert.kind, recipe.listed(k) or "as at the top level", _given(plan, expert.address)
        )
    console.print(experts)
    _print_notes(console, plan)
    for line in _disk_shortages(needs, room):
        console.print(f"does not fit: {line}")


def _print_notes(console: rich.console.Console, plan: Plan) -> None:
    for owner, note in plan.notes:
        console.print(f"{owner}: {note}")
    # The weights of another merge's output are not known yet.
    for line in left_out_lines(plan, [] if plan.documents else left_out(plan)):
        console.print(line)
    for line in [] if plan.documents else doubts(plan):
        console.print(f"warning: {line}")


def _given(plan: Plan, model: str) -> str:
    """Return a model as the config gives it, if it is the output of another merge of the same file."""
    return next((document.name for document in plan.documents if document.place == model), model)


def _disk(needs: DiskNeeds, room: DiskRoom | None) -> str:
    return f"{needs}; free: {'unknown' if room is None else rich.filesize.decimal(room.free)}"


def _disk_shortages(needs: DiskNeeds, room: DiskRoom | None) -> list[str]:
    lacking = "" if room is None else shortage(needs, room)
    return [lacking] if lacking else []


def _tensors(plan: Plan) -> rich.table.Table:
    header = plan.base_header
    elements = sum(tensor.numel for tensor in header.tensors.values())
    facts = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("method", plan.config.merge_method)
    for step in plan.config.calibrate:
        facts.add_row("then", f"{step}: {CORRECTIONS[step.method].summary}")
    facts.add_row("base", f"{_given(plan, plan.base.address)}: {header.architecture}, {header.num_layers} blocks")
    facts.add_row("tensors", f"{len(plan.merged)} merged of {len(header.tensors)}; the base provides the others")
    if plan.vocabulary is not None:
        made = "a new tokenizer" if plan.vocabulary.tokenizer else "the tokenizer of one model"
        facts.add_row("vocabulary", f"{plan.vocabulary.rows:,} rows of {made} (`tokenizer_source`)")
    facts.add_row("elements", f"{sum(plan.numels.values()):,} merged of {elements:,}")
    facts.add_row("merged bytes", f"{rich.filesize.decimal(plan.merged_bytes)}, in {plan.dtype}")
    if plan.config.dtype is None and plan.dtype != (own := main_dtype(header)):
        facts.add_row("", f"not in the base's {own}, in which small gradients become 0; the output is in {own}")
    return facts


def _facts(plan: Plan, work: Work, needs: DiskNeeds, room: DiskRoom | None) -> rich.table.Table:
    parameters, facts = plan.config.parameters, _tensors(plan)
    if plan.config.has_targets:
        facts.add_row("hidden layers", ", ".join(map(str, plan.hidden_layers)) or "none")
        facts.add_row("expert forwards", f"{work.samples}, once for all stages")
    facts.add_row("coefficients", f"{len(plan.merged)} per expert in stage 1")
    if plan.config.stages == 2:
        along, most = directions(plan), int(parameters.budget * len(plan.merged))
        if parameters.chunks == "direction":
            most = sum(along.values()) + (most if len(along) < len(plan.merged) else 0)
        facts.add_row("", f"at most {most} per expert in stage 2")
        if along:
            facts.add_row(
                "", f"along {min(along.values())} to {max(along.values())} directions of {len(along)} matrices"
            )
        for line in _chunks(plan, along):
            facts.add_row("", line)
    facts.add_row("disk", _disk(needs, room))
    facts.add_row("optimiser steps", f"{work.steps} per stage, {plan.config.stages} stages")
    return facts


def _chunks(plan: Plan, along: Mapping[str, int]) -> list[str]:
    """Return what is known about the chunks of stage 2 before the importance is. `along`: see `directions`."""
    budget, kappa, count = plan.config.parameters.budget, plan.config.parameters.kappa, len(plan.merged)
    if kappa > 0:
        # With a smaller share of the importance, a tensor's ⌊B·N · share⌋ is 0.
        return (
            [f"a tensor gets chunks from a share of {1 / budget / count:.2%} of the importance"] if budget < 1 else []
        )
    chunks = math.floor(budget + 1e-9)
    each = plan.config.parameters.chunks == "direction"
    sizes = {name: n for name, n in {**plan.numels, **along}.items() if not (each and name in along)}
    small = [name for name, size in sizes.items() if size < chunks]
    parts = "elements or directions" if along else "elements"
    return [f"fewer {parts} than their {chunks} chunks: {', '.join(small)}"] if small else []


def _experts(plan: Plan, samples: Sequence[int]) -> rich.table.Table:
    experts = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("expert", "given as", "prior", "loss weight", "samples", "from"):
        experts.add_column(column, overflow="fold")
    for expert, count in zip(plan.experts, samples, strict=True):
        prior = "auto" if expert.weight is None else f"{expert.weight:g}"
        experts.add_row(
            expert.name, expert.kind, prior, f"{expert.loss_weight:g}", str(count), _given(plan, expert.model)
        )
    return experts


def _predictions(ways: Sequence[Prediction], chosen: Prediction) -> rich.table.Table:
    """Return a table with one column per placement of the task vectors; the chosen placement is marked."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column("task vectors")
    for way in ways:
        table.add_column(f"{PLACES[way.where]}{' (chosen)' if way.where == chosen.where else ''}", justify="right")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    row("shards", *(str(way.shards) for way in ways))
    row("trainer memory", *(_gigabytes(way.memory.trainer) for way in ways))
    row("expert memory", *(_gigabytes(way.memory.expert) for way in ways))
    row("shard memory", *(_gigabytes(way.memory.shard) for way in ways))
    row("object store", *(_gigabytes(way.memory.store) for way in ways))
    row("page cache per node", *(_gigabytes(way.memory.page_cache) for way in ways))
    row("moved per step", *(_gigabytes(way.moved) for way in ways))
    row("step: computing", *(f"{way.step.compute:.3g} s" for way in ways))
    row("step: streaming", *(f"{way.step.stream:.3g} s" for way in ways))
    row("step: moving", *(f"{way.step.exchange:.3g} s" for way in ways))
    row("step", *(f"{way.step.total:.3g} s" for way in ways))
    row("whole run", *(f"{way.run_seconds:.3g} s" for way in ways))
    return table


def _gigabytes(nbytes: float | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / GB:.2f} GB"
