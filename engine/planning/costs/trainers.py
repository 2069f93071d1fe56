"""How many trainers a merge has, and whether each pass of a window has a gradient of its own.

The trainers deal the passes of a window among them and send gradients of the coefficients, a few kilobytes. Added in
the order of the passes, these give the same bits for any number of trainers. A sum of weight gradients over the window
(`gradients: accumulate`) has other last bits, and is the work of one trainer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from engine.config.resources import GradientUse
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.planning.costs.fitting import Role, with_enough_gpus
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.plan import Plan
from engine.planning.schedule import pass_limit


def check_trainers(config: Config) -> None:
    """Check that several trainers have passes to share.

    Raises:
        ConfigError: several trainers are given, and `gradients: accumulate`.
    """
    trainers = config.cluster.trainers
    if config.learned and config.gradients == "accumulate" and trainers != "auto" and trainers > 1:
        raise ConfigError(
            f"with `gradients: accumulate`, one trainer computes all passes of a window, and {trainers} are asked for",
            "cluster.trainers",
            "auto or 1",
            "set `gradients: stream`, or leave out `cluster.trainers`",
        )


def choose_trainers(plan: Plan, work: Work, machines: Machines, seats: int) -> tuple[GradientUse, int]:
    """Return `gradients`, which is accumulate or stream, and the number of trainers.

    What the config gives is kept. On GPUs, the scaling model decides the rest; on CPUs, a merge has one trainer.

    Args:
        plan: The plan.
        work: The calibration work.
        machines: The machines; their `trainers` are ignored.
        seats: The number of trainers for which they have room.
    """
    asked, gradients = plan.config.cluster.trainers, plan.config.gradients
    one = asked in ("auto", 1)
    if gradients == "accumulate" or (one and not machines.gpus):
        return "stream" if gradients == "stream" else "accumulate", 1
    most = max(1, min(seats, math.ceil(work.passes)))
    if asked != "auto":
        counts = {min(asked, most)}
    else:
        # The fewest trainers of which the slowest has a certain number of passes.
        counts = {math.ceil(work.passes / math.ceil(work.passes / count)) for count in range(1, most + 1)}
    choices: list[tuple[GradientUse, int]] = [("stream", count) for count in sorted(counts)]
    # Last: of equally fast ones, the first is taken, and this one holds the gradient of all weights.
    choices += [("accumulate", 1)] if gradients == "auto" and one else []

    def seconds(choice: tuple[GradientUse, int]) -> float:
        held, count = choice
        return choose(with_gradients(plan, held), work, replace(machines, trainers=count)).step.total

    return min(choices, key=seconds)


def settled(plan: Plan, tokens: Sequence[Sequence[int]], machines: Machines) -> tuple[Plan, Work, Machines]:
    """Return the plan, its work, and the machines with what a merge decides about its trainers on them.

    The plan has the GPUs that `num_gpus: auto` gets and the choice of `choose_trainers`; as many trainers are possible
    as have room. `tokens` are those of the samples of each expert.
    """
    for role in get_args(Role):
        plan = with_enough_gpus(plan, _work(plan, tokens, machines)[0], machines, role)
    work, seats = _work(plan, tokens, machines)
    gradients, trainers = choose_trainers(plan, work, machines, seats)
    return with_gradients(plan, gradients), work, replace(machines, trainers=trainers)


def _work(plan: Plan, tokens: Sequence[Sequence[int]], machines: Machines) -> tuple[Work, int]:
    """Return the work of a plan on the machines, and the number of trainers that these have room for."""
    cluster = plan.config.cluster
    each = cluster.trainer.num_gpus if isinstance(cluster.trainer.num_gpus, float) else 1.0
    on_gpu = bool(machines.gpus and each)
    if on_gpu:
        seats = int(machines.gpus // each * machines.nodes)
    else:
        seats = 1 if cluster.trainers == "auto" else cluster.trainers
    return Work.of(plan.config, tokens, pass_limit(plan.config, on_gpu, seats, tokens)), seats


def with_gradients(plan: Plan, gradients: GradientUse) -> Plan:
    """Return the plan with another value of `gradients`."""
    return replace(plan, config=plan.config.model_copy(update={"gradients": gradients}))
