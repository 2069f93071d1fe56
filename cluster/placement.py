"""The placement of a merge: on which node each actor runs and what it requests there, from nodes and plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.seats import Node, Seat, Seating
from engine.config.resources import GPU_PART, GradientUse, Use
from engine.config.schema import Config
from engine.errors import ClusterError
from engine.planning.costs.fitting import settings_that_fit
from engine.planning.costs.rates import GB, Site
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.factors import decomposed, factored
from engine.planning.plan import Plan, slices
from engine.planning.schedule import CPU_TOKENS, pass_limit


@dataclass(frozen=True)
class Devices:
    """What the trainer and each expert compute on.

    A run keeps that of its first start even if it loses nodes, because another kind of device, and other numbers of
    threads, may give other last bits.

    Attributes:
        trainer: The GPUs that the trainer requests.
        expert: The GPUs that each expert requests.
        threads: The CPU threads of the operations of each: the CPUs of most nodes.
        kinds: The types of the GPUs.
        factors: `cluster.factors`, which with the trainer's device decides which matrices are merged through factors.
        batch_tokens: Tokens of a pass of the trainer at most.
        logit_bytes: Bytes of logits that the trainer has in memory at a time; 0 until the layout is known.
        gradients: `gradients`; `auto` until the first layout decides it.
    """

    trainer: float
    expert: float
    threads: int = 1
    kinds: tuple[str, ...] = ()
    factors: Use = "auto"
    batch_tokens: int = CPU_TOKENS
    logit_bytes: int = 0
    gradients: GradientUse = "auto"

    @classmethod
    def of(cls, nodes: Sequence[Node], config: Config, tokens: Sequence[Sequence[int]] = ()) -> Devices:
        """Return the numbers of the config (`auto` is one GPU if the nodes have any), and what the nodes have.

        `tokens` are those of the samples of each expert.
        """
        usable = useful(nodes, config)
        auto = float(min(1.0, sum(node.gpus for node in usable)))
        trainer, expert = config.cluster.trainer.num_gpus, config.cluster.expert.num_gpus
        counts = Counter(max(1, int(node.cpus)) for node in usable)
        trainer = auto if trainer == "auto" else trainer
        seats = sum(_fitting(node.gpus, trainer) for node in usable) if trainer else 1
        return cls(
            trainer,
            auto if expert == "auto" else expert,
            max(counts, key=lambda cpus: (counts[cpus], cpus), default=1),
            tuple(sorted({node.kind for node in usable if node.gpus})),
            config.cluster.factors,
            pass_limit(config, trainer > 0, seats, tokens),
            gradients=config.gradients,
        )

    def factored(self, plan: Plan) -> tuple[str, ...]:
        """Return the matrices that the trainer merges through factors."""
        return factored(plan, self.trainer > 0, self.factors)

    def among(self, nodes: Sequence[Node]) -> list[Node]:
        """Return the nodes, without GPUs of other types than those on which the run began.

        Raises:
            ClusterError: GPUs are needed, and all are of other types.
        """
        fitting = [node if node.kind in self.kinds else replace(node, gpus=0) for node in nodes]
        others = sorted({node.kind for node in nodes if node.gpus} - {*self.kinds})
        if max(self.trainer, self.expert) and others and not any(node.gpus for node in fitting):
            raise ClusterError(
                f"the run began on GPUs of type {', '.join(self.kinds)}, which give other last bits than others",
                "the cluster",
                f"not only GPUs of type {', '.join(others)}",
                "add nodes with such GPUs, or discard the state of the run with --fresh",
            )
        return fitting


def arrange(nodes: Sequence[Node], plan: Plan, work: Work, devices: Devices, trainers: int = 1) -> Seating:
    """Return the seats of the layout that the scaling model estimates to be the fastest (docs/scaling.md).

    `trainers` is the number of trainers; only the first one has a seat (`cluster.trainer_seats`).

    Raises:
        ClusterError: no node fits the trainer or an expert.
    """
    fastest = choose(plan, work, replace(machines(nodes, plan.config, devices), trainers=trainers))
    seats, memory = lay_out(nodes, plan, devices, fastest.where, fastest.shards), fastest.memory
    return replace(
        seats,
        room=memory.step,
        batch_tokens=devices.batch_tokens,
        logit_bytes=devices.logit_bytes or memory.logit_bytes,
        activations=memory.activations,
        logits=memory.logits,
    )


def check_memory(nodes: Sequence[Node], plan: Plan, work: Work, devices: Devices) -> None:
    """Check that the largest node can hold the trainer's weights and gradient, if the trainer computes on the CPU.

    Raises:
        ClusterError: it cannot.
    """
    largest = max((node.memory for node in useful(nodes, plan.config)), default=0.0)
    there = machines(nodes, plan.config, devices)

    def wanted(changed: Plan) -> float:
        return choose(changed, work, there).memory.model

    if not devices.trainer and 0 < largest < wanted(plan):
        settings = settings_that_fit(plan, "trainer", lambda changed: wanted(changed) <= largest)
        do = f"set {settings}, or use a larger node" if settings else "use a larger node"
        raise ClusterError(
            f"the merged weights and their gradient take {wanted(plan) / GB:.1f} GB",
            "the trainer",
            f"at most the {largest / GB:.1f} GB of the largest node",
            f"{do}; `plan` shows the estimates",
        )


def machines(nodes: Sequence[Node], config: Config, devices: Devices) -> Machines:
    """Return the input of the scaling model: the smallest node, multiplied by the number of nodes with CPUs.

    The GPUs are those of all nodes, in equal parts.
    """
    usable = useful(nodes, config)
    gpus = sum(node.gpus for node in usable) / max(1, len(usable)) if devices.trainer else 0.0
    memory = min((node.memory for node in usable), default=0.0)
    return Machines(max(1, len(usable)), min((node.cpus for node in usable), default=1.0), gpus, memory or None)


def useful(nodes: Sequence[Node], config: Config) -> list[Node]:
    """Return the nodes with CPUs and the labels of `cluster.labels`, the largest first."""
    usable = [node for node in nodes if node.cpus > 0 and _has(node, config.cluster.labels)]
    return sorted(usable, key=lambda node: (-node.memory, -node.gpus, -node.cpus, node.id))


def lay_out(
    nodes: Sequence[Node], plan: Plan, devices: Devices, where: Site = "nodes", shards: int | None = None
) -> Seating:
    """Return the seats of trainer, experts and shards.

    The experts that run at the same time are as many as the GPUs besides the trainer's admit (with decomposed task
    vectors, the trainer's as well) or, on the CPU, one per node, because each uses all of its cores. Requested CPUs
    serve placement only: at most a third of a node's per kind of actor, so that trainer, expert and shards fit on a
    node with a single CPU.

    Raises:
        ClusterError: no node fits the trainer or an expert.
    """
    config = plan.config
    usable = useful(nodes, config)
    for role, gpus in (("trainer", devices.trainer), ("expert", devices.expert)):
        if not candidates(usable, config, role, gpus):
            raise _shortage(nodes, config, role, gpus)
    homes = candidates(usable, config, "trainer", devices.trainer)
    home = max(homes, key=lambda node: len(_places(usable, config, devices, node)))
    places = _places(usable, config, devices, home)
    beside = bool(places)
    places = (places or [home] * _fitting(home.gpus, devices.expert))[: len(plan.experts)]
    # Decomposed task vectors are learned over when the last expert has ended. Until then the trainer's GPUs are free.
    free = _fitting(devices.trainer, devices.expert) if beside and devices.expert and decomposed(plan) else 0
    at_home = min(free, len(plan.experts) - len(places))
    on = Counter(node.id for node in places)
    trainer = Seat(home.id, _share(home, 1), devices.trainer)
    if beside:
        reserved = trainer
        experts = tuple(Seat(node.id, _share(node, on[node.id]), devices.expert) for node in places)
        experts += (Seat(home.id, int(100 * trainer.cpus / max(1, at_home)) / 100, devices.expert),) * at_home
    else:
        # Experts and trainer take turns in one seat: the larger request of the two, in CPUs as in GPUs.
        experts = tuple(Seat(node.id, _share(node, len(places)), devices.expert) for node in places)
        reserved = Seat(
            home.id,
            max(trainer.cpus, sum(seat.cpus for seat in experts)),
            max(devices.trainer, _holding(devices.expert, len(places))),
        )
    within = config.cluster.shards == 0 or where == "trainer"
    return Seating(
        _shards([home] if where == "node" else usable, plan, shards),
        trainer,
        experts,
        reserved,
        beside,
        # On the CPU they would compete for the same cores; on GPUs each has its own.
        beside and not at_home and (devices.trainer > 0 or home.id not in on),
        within,
        devices.threads,
        devices.factored(plan),
        at_home=at_home,
    )


def lay_out_shards(nodes: Sequence[Node], plan: Plan, devices: Devices | None = None) -> Seating:
    """Return the seats of a weight-space method: one shard per node, or `cluster.shards`, and experts if they run.

    `devices` are those of the experts; None: of the nodes.

    Raises:
        ClusterError: no node has CPUs and the labels of the config, or fits an expert.
    """
    config, usable = plan.config, useful(nodes, plan.config)
    if not usable:
        raise _shortage(nodes, config, "shard", 0)
    if not config.uses_samples:
        return Seating(_shards(usable, plan, None))
    devices = replace(devices or Devices.of(nodes, config), trainer=0)
    # No node is a trainer's home.
    places = _places(usable, config, devices, Node(0, 0))[: len(plan.experts)]
    if not places:
        raise _shortage(nodes, config, "expert", devices.expert)
    on = Counter(node.id for node in places)
    experts = tuple(Seat(node.id, _share(node, on[node.id]), devices.expert) for node in places)
    return Seating(_shards(usable, plan, None), experts=experts, threads=devices.threads)


def _places(usable: Sequence[Node], config: Config, devices: Devices, home: Node) -> list[Node]:
    """Return the node of each expert that fits beside a trainer at `home`.

    The nodes take turns; the trainer's own comes last in each turn.
    """
    nodes = candidates(usable, config, "expert", devices.expert)
    others = [node for node in nodes if node.id != home.id]
    if not devices.expert:
        return others or nodes
    fitting = {
        node.id: _fitting(node.gpus, devices.expert, devices.trainer if node.id == home.id else 0) for node in nodes
    }
    order = [*others, *(node for node in nodes if node.id == home.id)]
    return [node for turn in range(max(fitting.values(), default=0)) for node in order if fitting[node.id] > turn]


def _fitting(gpus: float, each: float, taken: float = 0) -> int:
    """Return how many actors of `each` GPUs fit on a node beside one that has `taken`.

    As Ray counts: in whole numbers of `GPU_PART`, of which 1 / 0.1 is 10, and a fraction is a part of a single GPU.
    """
    part, used, one = (round(gpu / GPU_PART) for gpu in (each, taken, 1))
    whole = int(gpus) - math.ceil(taken)
    if each >= 1:
        return max(0, whole // int(each))
    return max(0, whole * (one // part) + ((one - used) // part if 0 < used < one else 0))


def _holding(each: float, count: int) -> float:
    """Return the GPUs that hold so many actors of `each`: whole ones, but for a single actor."""
    return each if count <= 1 or not each else math.ceil(count / max(1, _fitting(1, each))) * max(1.0, each)


def _shards(usable: Sequence[Node], plan: Plan, count: int | None) -> tuple[Seat, ...]:
    """Return the seat of each shard: in order of size, on the node with the smallest load relative to its memory."""
    wanted = plan.config.cluster.shards
    count = count or (wanted if isinstance(wanted, int) and wanted else len(usable))
    sizes = [sum(plan.numels[name] for name in names) for names in slices(plan, count)]
    loads = {node.id: 0.0 for node in usable}
    owner: dict[int, Node] = {}
    for index in sorted(range(count), key=lambda index: -sizes[index]):
        node = min(usable, key=lambda node: (loads[node.id] + max(1, sizes[index])) / (node.memory or 1))
        owner[index] = node
        loads[node.id] += max(1, sizes[index])
    on = Counter(node.id for node in owner.values())
    return tuple(Seat(owner[index].id, _share(owner[index], on[owner[index].id])) for index in range(count))


def candidates(usable: Sequence[Node], config: Config, role: str, gpus: float) -> list[Node]:
    """Return the nodes that fit an actor of a role with that many GPUs."""
    return [node for node in usable if node.gpus >= gpus and _has(node, _labels(config, role))]


def most_gpus(nodes: Sequence[Node], config: Config, role: str) -> float:
    """Return the most GPUs of a node that may hold the trainer or an expert (`role`)."""
    return max((node.gpus for node in candidates(useful(nodes, config), config, role, 0)), default=0.0)


def _labels(config: Config, role: str) -> Mapping[str, str]:
    return {"trainer": config.cluster.trainer.labels, "expert": config.cluster.expert.labels}.get(role, {})


def _has(node: Node, labels: Mapping[str, str]) -> bool:
    return all(node.labels.get(key) == value for key, value in labels.items())


def _share(node: Node, actors: int) -> float:
    """Return the CPUs that each actor of a kind requests: its part of a third of the node, 0.01 to 1, rounded down."""
    return max(0.01, int(100 * min(1.0, node.cpus / 3 / max(1, actors))) / 100)


def _shortage(nodes: Sequence[Node], config: Config, role: str, gpus: float) -> ClusterError:
    of_role = _labels(config, role)
    labels = {**config.cluster.labels, **of_role}
    needs = [f"{gpus:g} GPUs" if gpus else "CPUs", *(f"the label {key}={value}" for key, value in labels.items())]
    fitting = [node for node in useful(nodes, config) if _has(node, labels)]
    largest = max((node.gpus for node in fitting), default=0.0)
    total = sum(node.gpus for node in nodes)
    do = ["add such nodes"]
    if gpus and gpus != getattr(Devices.of(nodes, config), role):
        do += ["discard the state of the run, which began with that number of GPUs, with --fresh"]
    elif gpus:
        do += [f"lower `cluster.{role}.num_gpus`"]
    do += ["change `cluster.labels`"] if config.cluster.labels else []
    do += [f"change `cluster.{role}.labels`"] if of_role else []
    return ClusterError(
        f"no node fits the {role}, which needs {' and '.join(needs)}: of {len(nodes)} nodes with {total:g} GPUs in "
        f"total, {len(fitting)} match apart from GPUs, and the largest of these has {largest:g}",
        "the cluster",
        do=" or ".join(do),
    )
