"""Which node each actor of a merge sits on, and what it asks for there: a function of nodes and plan. Knows no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.config.schema import Config
from engine.errors import ClusterError
from engine.planning.plan import Plan, slices
from engine.planning.scaling import GB, Machines, Site, Work, choose

Bundle = dict[str, float]


MORE = "add nodes, or ask for less: num_gpus, labels or shards in the config's `cluster`"


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has, in use or not, and the labels that it was started with."""

    cpus: float
    gpus: float
    memory: float = 0
    id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seat:
    """An actor's place: a node, by its id, and what the actor asks for there."""

    node: str
    cpus: float
    gpus: float = 0

    @property
    def bundle(self) -> Bundle:
        """As Ray names resources."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


@dataclass(frozen=True)
class Seating:
    """Everybody's seats. `trainer` is None where nothing is learned.

    `beside`: experts and trainer have seats of their own. Else the experts take their turns within `home`, which is
    large enough for either, and the trainer comes when they are gone. `overlap`: the trainer may compute while experts
    do. `within_trainer`: it asks task vectors of its own, and the shards only read and write files.
    """

    shards: tuple[Seat, ...]
    trainer: Seat | None = None
    experts: tuple[Seat, ...] = ()
    home: Seat | None = None
    beside: bool = True
    overlap: bool = True
    within_trainer: bool = False

    @property
    def reserved(self) -> tuple[Seat, ...]:
        """What a merge cannot do without, to be had together: shards, the trainer's home, one expert. Further experts
        join as their seats become free.
        """
        return (*self.shards, *([self.home] if self.home else []), *(self.experts[:1] if self.beside else []))


@dataclass(frozen=True)
class Devices:
    """GPUs that the trainer and each expert ask for. A run keeps those of its first start, whatever nodes it loses:
    another kind of device has other last bits.
    """

    trainer: float
    expert: float

    @classmethod
    def of(cls, nodes: Sequence[Node], config: Config) -> Devices:
        """As the config says; auto: one each where there are any."""
        there = float(min(1.0, sum(node.gpus for node in useful(nodes, config))))
        trainer, expert = config.cluster.trainer.num_gpus, config.cluster.expert.num_gpus
        return cls(there if trainer == "auto" else trainer, there if expert == "auto" else expert)


def arrange(nodes: Sequence[Node], plan: Plan, work: Work, devices: Devices) -> Seating:
    """The layout that the scaling model says is the quickest (docs/scaling.md).

    Raises:
        ClusterError: the nodes have not what it takes; with the numbers.
    """
    way = choose(plan, work, machines(nodes, plan.config, devices))
    return lay_out(nodes, plan, devices, way.where, way.shards)


def check_memory(nodes: Sequence[Node], plan: Plan, work: Work, devices: Devices) -> None:
    """Whether any node holds the trainer's weights and gradient, where it computes on the CPU.

    Raises:
        ClusterError: none does.
    """
    largest = max((node.memory for node in useful(nodes, plan.config)), default=0.0)
    wanted = choose(plan, work, machines(nodes, plan.config, devices)).memory.model
    if not devices.trainer and 0 < largest < wanted:
        raise ClusterError(
            f"the merged weights and their gradient take {wanted / GB:.1f} GB",
            "the trainer",
            f"at most the {largest / GB:.1f} GB of the largest node",
            "`gradients: stream`, `dtype: bfloat16`, or a larger node; `plan` shows what each takes",
        )


def machines(nodes: Sequence[Node], config: Config, devices: Devices) -> Machines:
    """The cluster as the scaling model sees it: its smallest node, as many times as there are nodes that compute."""
    there = useful(nodes, config)
    gpus = max((node.gpus for node in there), default=0.0) if devices.trainer else 0.0
    memory = min((node.memory for node in there), default=0.0)
    return Machines(max(1, len(there)), min((node.cpus for node in there), default=1.0), gpus, memory or None)


def useful(nodes: Sequence[Node], config: Config) -> list[Node]:
    """The nodes that may be used, the largest first: they have CPUs, and the labels that `cluster.labels` asks for."""
    there = [node for node in nodes if node.cpus > 0 and _has(node, config.cluster.labels)]
    return sorted(there, key=lambda node: (-node.memory, -node.gpus, -node.cpus, node.id))


def lay_out(
    nodes: Sequence[Node], plan: Plan, devices: Devices, where: Site = "nodes", shards: int | None = None
) -> Seating:
    """Trainer, experts and shards on their nodes.

    As many experts at a time as there are GPUs for beside the trainer, or one a node where they compute on the CPU, as
    each uses all of its cores. CPU figures only say where actors may be: thirds of a node's at most, so that trainer,
    expert and shards fit even a node of one CPU.

    Raises:
        ClusterError: there is no node for the trainer or for an expert; with the numbers.
    """
    config = plan.config
    there = useful(nodes, config)
    for role, gpus in (("trainer", devices.trainer), ("expert", devices.expert)):
        if not _candidates(there, config, role, gpus):
            raise _shortage(nodes, config, role, gpus)
    asked = len(plan.experts) if config.has_targets else 0
    homes = _candidates(there, config, "trainer", devices.trainer)
    home = max(homes, key=lambda node: len(_places(there, config, devices, node)))
    places = _places(there, config, devices, home)
    beside = bool(places)
    places = (places or [home] * int(home.gpus // devices.expert))[:asked]
    on = Counter(node.id for node in places)
    trainer = Seat(home.id, _share(home, 1), devices.trainer)
    if beside:
        reserved = trainer
        experts = tuple(Seat(node.id, _share(node, on[node.id]), devices.expert) for node in places)
    else:
        # In turns: the larger of the two needs, in CPUs as in GPUs.
        experts = tuple(Seat(node.id, _share(node, len(places)), devices.expert) for node in places)
        reserved = Seat(
            home.id,
            max(trainer.cpus, sum(seat.cpus for seat in experts)),
            max(devices.trainer, devices.expert * len(places)),
        )
    within = config.cluster.shards == 0 or where == "trainer"
    return Seating(
        _shards([home] if where == "node" else there, plan, shards),
        trainer,
        experts,
        reserved,
        beside,
        # On the CPU both would want the same cores; a GPU is each one's own.
        beside and (devices.trainer > 0 or home.id not in on),
        within,
    )


def lay_out_shards(nodes: Sequence[Node], plan: Plan) -> Seating:
    """Shards alone, for a merge that learns nothing: one a node, which uses all its cores, or as many as asked for.

    Raises:
        ClusterError: no node may be used.
    """
    there = useful(nodes, plan.config)
    if not there:
        raise _shortage(nodes, plan.config, "shard", 0)
    return Seating(_shards(there, plan, None))


def _places(there: Sequence[Node], config: Config, devices: Devices, home: Node) -> list[Node]:
    """The node of each expert that fits beside a trainer at `home`: every node once, then every node again, …; the
    trainer's own comes last.
    """
    nodes = _candidates(there, config, "expert", devices.expert)
    others = [node for node in nodes if node.id != home.id]
    if not devices.expert:
        return others or nodes
    left = {node.id: node.gpus - (devices.trainer if node.id == home.id else 0) for node in nodes}
    order = [*others, *(node for node in nodes if node.id == home.id)]
    rounds = max((int(gpus // devices.expert) for gpus in left.values()), default=0)
    return [node for turn in range(rounds) for node in order if left[node.id] // devices.expert > turn]


def _shards(there: Sequence[Node], plan: Plan, count: int | None) -> tuple[Seat, ...]:
    """Each shard, the one with the most bytes first, on the node that has least of them for its memory."""
    wanted = plan.config.cluster.shards
    count = count or (wanted if isinstance(wanted, int) and wanted else len(there))
    sizes = [sum(plan.numels[name] for name in names) for names in slices(plan, count)]
    loads = {node.id: 0.0 for node in there}
    owner: dict[int, Node] = {}
    for index in sorted(range(count), key=lambda index: -sizes[index]):
        node = min(there, key=lambda node: (loads[node.id] + max(1, sizes[index])) / (node.memory or 1))
        owner[index] = node
        loads[node.id] += max(1, sizes[index])
    on = Counter(node.id for node in owner.values())
    return tuple(Seat(owner[index].id, _share(owner[index], on[owner[index].id])) for index in range(count))


def _candidates(there: Sequence[Node], config: Config, role: str, gpus: float) -> list[Node]:
    return [node for node in there if node.gpus >= gpus and _has(node, _labels(config, role))]


def _labels(config: Config, role: str) -> Mapping[str, str]:
    return {"trainer": config.cluster.trainer.labels, "expert": config.cluster.expert.labels}.get(role, {})


def _has(node: Node, labels: Mapping[str, str]) -> bool:
    return all(node.labels.get(key) == value for key, value in labels.items())


def _share(node: Node, actors: int) -> float:
    """What each of so many actors of a kind asks of a third of the node: a CPU at most, in hundredths, rounded down."""
    return max(0.01, int(100 * min(1.0, node.cpus / 3 / max(1, actors))) / 100)


def _shortage(nodes: Sequence[Node], config: Config, role: str, gpus: float) -> ClusterError:
    labels = {**config.cluster.labels, **_labels(config, role)}
    asked = [f"{gpus:g} GPUs" if gpus else "CPUs", *(f"the label {key}={value}" for key, value in labels.items())]
    there = useful(nodes, config)
    largest = max((node.gpus for node in there if _has(node, labels)), default=0.0)
    fitting = sum(_has(node, labels) for node in there)
    total = sum(node.gpus for node in nodes)
    return ClusterError(
        f"no node for the {role}: it asks for one with {' and '.join(asked)}; of {len(nodes)} nodes with "
        f"{total:g} GPUs in all, {fitting} would do but for GPUs, the largest has {largest:g}",
        "the cluster",
        do=MORE,
    )
