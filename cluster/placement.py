"""How many actors a merge has and what each asks for: a pure function of nodes and config. Knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import Config

Bundle = dict[str, float]


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Placement:
    """One bundle for the trainer, one for each expert that runs at the same time, one for each shard."""

    trainer: Bundle
    experts: tuple[Bundle, ...]
    shards: tuple[Bundle, ...]


def place(nodes: Sequence[Node], config: Config) -> Placement:
    """As many experts at a time as there are GPUs for (without GPUs: one a node, as each uses all of its cores).

    Experts are done before the trainer starts, so they share GPUs. CPU figures only say where actors may be: halves of
    a node's at most, so that trainer, expert and shards fit even a node of one CPU.
    """
    gpus = sum(node.gpus for node in nodes)
    useful = [node for node in nodes if node.cpus > 0]
    most = max((node.cpus for node in useful), default=1.0)
    expert = _gpus(config.cluster.expert.num_gpus, gpus)
    trainer = _gpus(config.cluster.trainer.num_gpus, gpus)
    slots = sum(int(node.gpus // expert) for node in nodes) if expert else len(useful)
    count = max(1, len(useful)) if config.cluster.shards == "auto" else config.cluster.shards
    # Whole hundredths, rounded down: shards of one node never ask for more together than the half that is theirs.
    per_node = -(-count // max(1, len(useful)))
    shard_cpus = max(0.01, int(100 * min(1.0, most / 2 / per_node)) / 100)
    half = min(1.0, most / 2)
    return Placement(
        trainer=_bundle(half, trainer),
        experts=(_bundle(half, expert),) * max(1, min(slots, len(config.models))),
        shards=(_bundle(shard_cpus, 0),) * count,
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
