"""The seats of a merge's trainers besides the first: what the experts leave when they have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.placement import Devices, arrange, candidates, lay_out, machines, useful
from cluster.seats import Node, Seat, Seating
from engine.planning.costs.scaling import Work
from engine.planning.costs.trainers import choose_trainers, with_gradients
from engine.planning.plan import Plan


def arrange_trainers(nodes: Sequence[Node], plan: Plan, work: Work, devices: Devices) -> Seating:
    """Return the fastest layout, see `arrange`, with as many trainers as are fastest and have room.

    Raises:
        ClusterError: no node fits the trainer or an expert.
    """
    others = _other_seats(nodes, plan, devices, lay_out(nodes, plan, devices))
    given = machines(nodes, plan.config, devices)
    gradients, trainers = choose_trainers(with_gradients(plan, devices.gradients), work, given, 1 + len(others))
    layout = arrange(nodes, with_gradients(plan, gradients), work, devices, trainers)
    return replace(layout, others=others[: trainers - 1], gradients=gradients)


def reserved_place(layout: Seating, other: int) -> int | None:
    """Return the reserved seat in which the other trainer of that index starts; None: its seat is not reserved.

    The first ones share the reserved seat of the first expert, as far as its GPUs reach.
    """
    gpus, first = layout.others[other].gpus, layout.experts[0]
    inside = layout.beside and gpus and layout.others[other].node == first.node and (other + 1) * gpus <= first.gpus
    return len(layout.shards) + 1 if inside else None


def _other_seats(nodes: Sequence[Node], plan: Plan, devices: Devices, layout: Seating) -> tuple[Seat, ...]:
    """Return seats for all GPUs that the first trainer leaves; on CPUs, as many as `cluster.trainers` says.

    The nodes take turns. No CPUs are requested, since the experts have ended when these trainers start.
    """
    config, first, home = plan.config, layout.experts[0], layout.home
    assert home is not None
    fitting = candidates(useful(nodes, config), config, "trainer", devices.trainer)
    if not devices.trainer:
        wanted = config.cluster.trainers
        turns = [node.id for node in fitting if node.id != home.node] + [home.node]
        return tuple(Seat(turns[index % len(turns)], 0) for index in range(0 if wanted == "auto" else wanted - 1))
    left = {node.id: node.gpus - (home.gpus if node.id == home.node else 0) for node in fitting}
    inside = 0
    if layout.beside and first.node in left:
        inside = int(first.gpus // devices.trainer)
        left[first.node] -= first.gpus
    rounds = max(int(gpus // devices.trainer) for gpus in left.values())
    outside = [node for turn in range(rounds) for node in left if left[node] // devices.trainer > turn]
    return tuple(Seat(node, 0, devices.trainer) for node in [first.node] * inside + outside)
