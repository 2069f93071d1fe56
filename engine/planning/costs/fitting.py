"""What does not fit the memory of the machines, by the scaling model, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

from engine.config.resources import ActorResources
from engine.planning.costs.rates import GB, MemoryEstimate, Prediction
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.plan import Plan
from engine.sizes import FILLED

Role = Literal["trainer", "expert"]


def shortages(plan: Plan, work: Work, prediction: Prediction, machines: Machines) -> list[str]:
    """Return a line for each process that does not fit the machines, with advice. Unknown limits are not checked."""
    memory, roles = prediction.memory, get_args(Role)
    lines = [line for role in roles for line in _shortage(plan, work, memory, machines, role)]
    if machines.memory is not None:
        if memory.shard > machines.memory:
            lines.append(f"a shard needs {memory.shard / GB:.1f} GB, but a node has {machines.memory / GB:.1f} GB")
        if memory.page_cache > machines.memory:
            lines.append(
                f"each node reads {memory.page_cache / GB:.1f} GB of checkpoints per pass, but has "
                f"{machines.memory / GB:.1f} GB to cache them, so passes run at the speed of the disk; use more nodes"
            )
    return lines


def _shortage(plan: Plan, work: Work, memory: MemoryEstimate, machines: Machines, role: Role) -> list[str]:
    """Return the line of a trainer or an expert that does not fit, or none."""
    number = getattr(plan.config.cluster, role).num_gpus
    requested = 0.0 if number == "auto" else number
    if requested > machines.gpus:
        most = f"{machines.gpus:g} GPUs" if machines.gpus else "none"
        lower = f"at most {int(machines.gpus)}" if machines.gpus else "0 or auto"
        return [
            f"the {role} requests {requested:g} GPUs, but a node has {most}; set `cluster.{role}.num_gpus`: {lower}"
        ]
    limit = machines.gpu_memory if machines.gpus else machines.memory
    if limit is None or _is_enough(memory, machines, role, requested):
        return []
    kind, devices = ("GPU" if machines.gpus else "node"), max(1.0, requested)
    have = f"{devices:g} {kind}s have" if devices > 1 else f"a {kind} has"
    wanted = memory.trainer if role == "trainer" else memory.expert
    line = f"the {role} needs {wanted / GB:.1f} GB, but {have} {limit * devices / GB:.1f} GB"
    if machines.gpus:
        settings = remedies(plan, work, machines, role, devices, machines.gpus)
    else:
        settings = settings_that_fit(plan, role, lambda changed: fits(changed, work, machines, role, 0))
    return [f"{line}; {f'set {settings}, or use' if settings else 'use'} larger {kind}s"]


def needed(memory: MemoryEstimate, role: Role) -> float:
    """Return the bytes that a trainer or an expert needs at least."""
    return memory.least if role == "trainer" else memory.expert


def capacity(free: float, gpus: float) -> float:
    """Return the bytes that a model can use on so many GPUs with `free` bytes each."""
    return FILLED * free * gpus if gpus > 1 else free


def with_enough_gpus(plan: Plan, work: Work, machines: Machines, role: Role) -> Plan:
    """Return the plan with the GPUs that a trainer or an expert with `num_gpus: auto` gets because it needs them."""
    resources: ActorResources = getattr(plan.config.cluster, role)
    if resources.num_gpus != "auto" or not machines.gpus or machines.gpu_memory is None:
        return plan
    if fits(plan, work, machines, role, 1):
        return plan
    number = enough_gpus(plan, work, machines, role, 1, machines.gpus)
    if number is None:
        return plan
    seat = resources.model_copy(update={"num_gpus": float(number)})
    return _with(plan, cluster=plan.config.cluster.model_copy(update={role: seat}))


def enough_gpus(plan: Plan, work: Work, machines: Machines, role: Role, gpus: float, most: float) -> int | None:
    """Return the smallest number of GPUs above `gpus`, up to `most`, that suffices; None if none does.

    `machines.gpu_memory` are the free bytes of each.
    """
    return next((n for n in range(max(2, int(gpus) + 1), int(most) + 1) if fits(plan, work, machines, role, n)), None)


def remedies(plan: Plan, work: Work, machines: Machines, role: Role, gpus: float, most: float) -> str:
    """Return the settings with which a trainer or an expert fits its GPUs.

    More GPUs are among them if that suffices. Settings that are made already, or that would not help, are not; empty if
    nothing helps. For the arguments see `enough_gpus`.
    """
    number = enough_gpus(plan, work, machines, role, gpus, most)
    settings = settings_that_fit(plan, role, lambda changed: fits(changed, work, machines, role, gpus))
    if number is not None:
        return " or ".join([f"`cluster.{role}.num_gpus: {number}`", *([settings] if settings else [])])
    if settings:
        return settings
    changes = _changes(plan, role)
    number = enough_gpus(_with_all(plan, changes.values()), work, machines, role, gpus, most)
    return "" if number is None else " and ".join([f"`cluster.{role}.num_gpus: {number}`", *changes])


def settings_that_fit(plan: Plan, role: Role, suffices: Callable[[Plan], bool]) -> str:
    """Return the settings with which a plan needs little enough memory, by `suffices`.

    Those that do so alone, else the fewest together; empty if not even all of them do.
    """
    changes = _changes(plan, role)
    alone = [name for name, change in changes.items() if suffices(change(plan))]
    if alone or not suffices(_with_all(plan, changes.values())):
        return " or ".join(alone)
    for name in list(changes):
        others = {other: change for other, change in changes.items() if other != name}
        if suffices(_with_all(plan, others.values())):
            changes = others
    return " and ".join(changes)


def fits(plan: Plan, work: Work, machines: Machines, role: Role, gpus: float) -> bool:
    """Return whether a trainer or an expert fits so many GPUs, or a node if the machines have none."""
    return _is_enough(choose(plan, work, machines).memory, machines, role, gpus)


def _is_enough(memory: MemoryEstimate, machines: Machines, role: Role, gpus: float) -> bool:
    if machines.gpus:
        assert machines.gpu_memory is not None
        return needed(memory, role) <= capacity(machines.gpu_memory, gpus)
    assert machines.memory is not None
    return (memory.trainer if role == "trainer" else memory.expert) <= machines.memory


def _with_all(plan: Plan, changes: Iterable[Callable[[Plan], Plan]]) -> Plan:
    for change in changes:
        plan = change(plan)
    return plan


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
