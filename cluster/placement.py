"""How many actors a merge has and what each asks for: a pure function of nodes and config. Knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import Config
from engine.errors import ClusterError
from engine.plan import Plan
from engine.scaling import GB, Machines, Where, Work, choose

Bundle = dict[str, float]


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has."""

    cpus: float
    gpus: float
    memory: float = 0


@dataclass(frozen=True)
class Placement:
    """One bundle for the trainer, one for each expert that runs at the same time, one for each shard.

    With `within_trainer` the trainer asks task vectors of its own, and the shards only read and write files; with
    `together` the shards are on the trainer's node; with `beside` the trainer may start while experts are at work.
    """

    trainer: Bundle
    experts: tuple[Bundle, ...]
    shards: tuple[Bundle, ...]
    within_trainer: bool = False
    together: bool = False
    beside: bool = False


def arrange(nodes: Sequence[Node], plan: Plan, work: Work) -> Placement:
    """The placement that the scaling model says is the quickest (docs/scaling.md).

    Raises:
        ClusterError: no node holds the trainer's weights and gradient, on the CPU.
    """
    there = machines(nodes, plan.config)
    way = choose(plan, work, there)
    largest = max((node.memory for node in nodes if node.cpus > 0), default=0.0)
    if not there.gpus and 0 < largest < way.memory.model:
        raise ClusterError(
            f"the merged weights and their gradient take {way.memory.model / GB:.1f} GB",
            "the trainer",
            f"at most the {largest / GB:.1f} GB of the largest node",
            "`gradients: stream`, `dtype: bfloat16`, or a larger node; `plan` shows what each takes",
        )
    return place(nodes, plan.config, way.where, way.shards)


def machines(nodes: Sequence[Node], config: Config) -> Machines:
    """The cluster as the scaling model sees it: its smallest node, as many times as there are nodes that compute."""
    useful = [node for node in nodes if node.cpus > 0]
    gpus = max((node.gpus for node in useful), default=0.0) if config.cluster.trainer.num_gpus != 0 else 0.0
    memory = min((node.memory for node in useful), default=0.0)
    return Machines(max(1, len(useful)), min((node.cpus for node in useful), default=1.0), gpus, memory or None)


def place(nodes: Sequence[Node], config: Config, where: Where | None = None, shards: int | None = None) -> Placement:
    """As many experts at a time as there are GPUs for (without GPUs: one a node, as each uses all of its cores).

    Experts are done before the trainer starts, so they share GPUs; without any all start at once, as a process takes
    seconds to start. CPU figures only say where actors may be: thirds of a node's at most, so that trainer, expert and
    shards fit even a node of one CPU.
    """
    gpus = sum(node.gpus for node in nodes)
    useful = [node for node in nodes if node.cpus > 0]
    third = max((node.cpus for node in useful), default=1.0) / 3
    expert = _gpus(config.cluster.expert.num_gpus, gpus)
    trainer = _gpus(config.cluster.trainer.num_gpus, gpus)
    slots = sum(int(node.gpus // expert) for node in nodes) if expert else len(useful)
    at_once = max(1, min(slots, len(config.models)))
    wanted = config.cluster.shards
    count = shards or max(1, len(useful) if wanted == "auto" else wanted)
    hosts = 1 if where == "node" else max(1, len(useful))
    return Placement(
        trainer=_bundle(_share(third, 1), trainer),
        experts=(_bundle(_share(third, -(-at_once // max(1, len(useful)))), expert),) * at_once,
        shards=(_bundle(_share(third, -(-count // hosts)), 0),) * count,
        within_trainer=wanted == 0 or where == "trainer",
        together=where == "node",
        beside=not (expert or trainer),
    )


def place_shards(nodes: Sequence[Node], config: Config) -> Placement:
    """Shards alone, for a merge that learns nothing: one a node, which uses all its cores, or as many as asked for."""
    useful = [node for node in nodes if node.cpus > 0]
    wanted = config.cluster.shards
    count = wanted if isinstance(wanted, int) and wanted else max(1, len(useful))
    cpus = max((node.cpus for node in useful), default=1.0)
    bundle = _bundle(_share(cpus, -(-count // max(1, len(useful)))), 0)
    return Placement(trainer={}, experts=(), shards=(bundle,) * count)


def _share(third: float, actors: int) -> float:
    """What each of so many actors of a node asks of its third: a CPU at most, in whole hundredths, rounded down."""
    return max(0.01, int(100 * min(1.0, third / actors)) / 100)


def fits(nodes: Sequence[Node], bundles: Sequence[Bundle]) -> bool:
    """Whether each of the bundles, alone, finds a node that has all of it, in use or not."""
    return all(
        any(node.cpus >= bundle.get("CPU", 0) and node.gpus >= bundle.get("GPU", 0) for node in nodes)
        for bundle in bundles
    )


def shortage(nodes: Sequence[Node], bundles: Sequence[Bundle]) -> str:
    """What is asked for beside what there is, in one line."""
    asked = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
    there = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    parts = [f"{asked[kind]:g} of {there[kind]:g} {kind}s" for kind in asked if asked[kind]]
    return f"asked for: {' and '.join(parts)}, in {len(bundles)} parts, on {len(nodes)} nodes"


def _gpus(wanted: str | float, there: float) -> float:
    return float(min(1.0, there)) if isinstance(wanted, str) else wanted


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
