"""What a merge would do, as tables for a person. Knows plans only."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
import rich.console
import rich.filesize
import rich.table

from engine.plan import Plan


def print_plan(plan: Plan, samples: Sequence[int]) -> None:
    """Print base, experts, tensors, bytes and steps; `samples` is how many each expert has."""
    console = rich.console.Console(highlight=False)
    header, parameters = plan.base_header, plan.config.parameters
    experts = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("expert", "given as", "prior", "loss weight", "samples", "from"):
        experts.add_column(column, overflow="fold")
    for expert, count in zip(plan.experts, samples, strict=True):
        experts.add_row(
            expert.name, expert.kind, f"{expert.weight:g}", f"{expert.loss_weight:g}", str(count), expert.model
        )
    elements = sum(tensor.numel for tensor in header.tensors.values())
    merged = sum(plan.numels.values())
    steps = -(-max(samples) * len(samples) * parameters.epochs // parameters.gradient_accumulation)
    facts = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("method", plan.config.merge_method)
    facts.add_row("base", f"{plan.base.model}: {header.architecture}, {header.num_layers} blocks")
    facts.add_row("tensors", f"{len(plan.merged)} merged of {len(header.tensors)}; the others stay the base's")
    facts.add_row("elements", f"{merged:,} merged of {elements:,}")
    facts.add_row("moved by a step", f"{rich.filesize.decimal(plan.merged_bytes)} each way, in {plan.dtype}")
    facts.add_row("hidden layers", ", ".join(map(str, plan.hidden_layers)) or "none")
    facts.add_row("expert forwards", f"{sum(samples)}, once for all stages")
    facts.add_row("coefficients", f"{len(plan.merged)} an expert in stage 1")
    if plan.config.stages == 2:
        facts.add_row("", f"at most {int(parameters.budget * len(plan.merged))} an expert in stage 2")
    facts.add_row("optimiser steps", f"{steps} a stage, {plan.config.stages} stages")
    console.print(facts)
    console.print(experts)
