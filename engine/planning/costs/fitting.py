"""What does not fit the memory of the machines, by the scaling model, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from engine.planning.costs.rates import GB, MemoryEstimate, Prediction
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.plan import Plan
from engine.sizes import FILLED

Role = Literal["trainer", "expert"]


def shortages(plan: Plan, prediction: Prediction, machines: Machines) -> list[str]:
    """Return a line for each process that does not fit the machines, with advice. Unknown limits are not checked."""
    memory, lines = prediction.memory, []
    kind, limit = ("GPU", machines.gpu_memory) if machines.gpus else ("node", machines.memory)
    if limit is not None:
        cluster = plan.config.cluster
        for role, needed, requested in (
            ("trainer", memory.trainer, cluster.trainer.num_gpus),
            ("expert", memory.expert, cluster.expert.num_gpus),
        ):
            devices = requested if machines.gpus and requested != "auto" and requested > 1 else 1
            if needed > limit * devices:
                advice = list(_changes(plan, "trainer")) if role == "trainer" else []
                advice += [f"more GPUs (`cluster.{role}.num_gpus`)"] if machines.gpus else []
                have = f"{devices:g} {kind}s have" if devices > 1 else f"a {kind} has"
                line = f"the {role} needs {needed / GB:.1f} GB, but {have} {limit * devices / GB:.1f} GB"
                lines.append(f"{line}; use {' or '.join(advice)}" if advice else line)
    if machines.memory is not None:
        if memory.shard > machines.memory:
            lines.append(f"a shard needs {memory.shard / GB:.1f} GB, but a node has {machines.memory / GB:.1f} GB")
        if memory.page_cache > machines.memory:
            lines.append(
                f"each node reads {memory.page_cache / GB:.1f} GB of checkpoints per pass, but has "
                f"{machines.memory / GB:.1f} GB to cache them, so passes run at the speed of the disk; use more nodes"
            )
    return lines


def needed(memory: MemoryEstimate, role: Role) -> float:
    """Return the bytes that a trainer or an expert needs at least."""
    return memory.least if role == "trainer" else memory.expert


def capacity(free: float, gpus: float) -> float:
    """Return the bytes that a model can use on so many GPUs with `free` bytes each."""
    return FILLED * free * gpus if gpus > 1 else free


def enough_gpus(plan: Plan, work: Work, machines: Machines, role: Role, gpus: float, most: float) -> int | None:
    """Return the smallest number of GPUs above `gpus`, up to `most`, that suffices; None if none does.

    `machines.gpu_memory` are the free bytes of each.
    """
    return next((n for n in range(max(2, int(gpus) + 1), int(most) + 1) if _fits(plan, work, machines, role, n)), None)


def remedies(plan: Plan, work: Work, machines: Machines, role: Role, gpus: float, most: float) -> str:
    """Return the settings with which a trainer or an expert fits its GPUs: those that suffice alone, else all of them.

    Settings that are made already, or that would not help, are not among them; empty if nothing helps. For the
    arguments see `enough_gpus`.
    """
    changes, number = _changes(plan, role), enough_gpus(plan, work, machines, role, gpus, most)
    alone = [] if number is None else [f"`cluster.{role}.num_gpus: {number}`"]
    alone += [name for name, change in changes.items() if _fits(change(plan), work, machines, role, gpus)]
    if alone:
        return " or ".join(alone)
    for change in changes.values():
        plan = change(plan)
    if changes and _fits(plan, work, machines, role, gpus):
        return " and ".join(changes)
    number = enough_gpus(plan, work, machines, role, gpus, most)
    return "" if number is None else " and ".join([f"`cluster.{role}.num_gpus: {number}`", *changes])


def _fits(plan: Plan, work: Work, machines: Machines, role: Role, gpus: float) -> bool:
    assert machines.gpu_memory is not None
    return needed(choose(plan, work, machines).memory, role) <= capacity(machines.gpu_memory, gpus)


def _changes(plan: Plan, role: Role) -> dict[str, Callable[[Plan], Plan]]:
    """Return the settings that save memory and are not made yet, by their text in the YAML."""
    changes: dict[str, Callable[[Plan], Plan]] = {}
    if role == "trainer" and plan.config.gradients != "stream":
        changes["`gradients: stream`"] = lambda plan: _with(plan, gradients="stream")
    if role == "trainer" and not plan.config.gradient_checkpointing:
        changes["`gradient_checkpointing: true`"] = lambda plan: _with(plan, gradient_checkpointing=True)
    if plan.dtype == "float32":
        changes["`dtype: bfloat16`"] = lambda plan: replace(_with(plan, dtype="bfloat16"), dtype="bfloat16")
    return changes


def _with(plan: Plan, **options: Any) -> Plan:
    return replace(plan, config=plan.config.model_copy(update=options))
