"""Nodes of a cluster, and the seats of a merge's actors on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.config.resources import GradientUse
from engine.planning.schedule import CPU_TOKENS
from engine.sizes import LOGIT_BYTES

Bundle = dict[str, float]
# Ray's label for the type of a node's accelerators.
KIND = "ray.io/accelerator-type"


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its resources, in use or not, memory in bytes, and the labels given at its start."""

    cpus: float
    gpus: float
    memory: float = 0
    id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The type of the node's GPUs as Ray names it, such as H100; empty without GPUs or if Ray doesn't know it."""
        return self.labels.get(KIND, "") if self.gpus else ""


@dataclass(frozen=True)
class Seat:
    """The seat of an actor: a node, by its id, and the resources that the actor requests there."""

    node: str
    cpus: float
    gpus: float = 0

    @property
    def bundle(self) -> Bundle:
        """The resources by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


@dataclass(frozen=True)
class Seating:
    """The seats of all actors of a merge.

    Attributes:
        shards: The seats of the shards.
        trainer: The seat of the first trainer; None for a weight-space method.
        experts: The seats of the experts that can run at the same time.
        home: The reserved seat in which the trainer runs.
        beside: Experts have seats besides the trainer's. Else they run within `home`, which is large enough for
            either, and the trainer starts after them.
        at_home: How many of the last `experts` are within `home` nevertheless; the trainer starts after all experts.
        overlap: The trainer may compute while experts do.
        within_trainer: The trainer computes the sums over task vectors itself; shards only read and write files.
        threads: The CPU threads of the operations of trainer and experts.
        factored: The matrices that the trainer merges through factors, in its own process.
        room: Bytes of the trainer's device that an optimiser step needs besides weights and factors.
        batch_tokens: Tokens of a pass of the trainer at most.
        logit_bytes: Bytes of logits that the trainer has in memory at a time, in one copy.
        others: The seats of the other trainers, which start when all experts have ended. They request no CPUs.
        gradients: `gradients` of the config; of a merge with learned coefficients, accumulate or stream.
        activations, logits: Bytes of a step's activations, and of all copies of its logits.
    """

    shards: tuple[Seat, ...]
    trainer: Seat | None = None
    experts: tuple[Seat, ...] = ()
    home: Seat | None = None
    beside: bool = True
    overlap: bool = True
    within_trainer: bool = False
    threads: int = 1
    factored: tuple[str, ...] = ()
    room: float = 0
    batch_tokens: int = CPU_TOKENS
    logit_bytes: int = LOGIT_BYTES
    others: tuple[Seat, ...] = ()
    at_home: int = 0
    gradients: GradientUse = "accumulate"
    activations: float = 0
    logits: float = 0

    @property
    def reserved(self) -> tuple[Seat, ...]:
        """The seats that must be free before the merge starts: the shards', the trainer's home, the first expert's.

        Further experts start as their seats become free.
        """
        return (*self.shards, *([self.home] if self.home else []), *(self.experts[:1] if self.beside else []))
