"""The estimates of the scaling model for one placement of the task vectors, and the rates of machines.

Units: bytes, seconds and FLOP. The rates hold without `cluster.rates`. Those of a CPU were measured on two cores of an
EPYC; the rate of a GPU is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MB, GB = 1e6, 1e9

# The GPU rate is a quarter of an H200's dense bfloat16 rate, which single samples reach; decompositions are in float32
# and float64.
CPU_FLOPS, GPU_FLOPS, GPU_DECOMPOSING = 177e9, 200e12, 20e12
CORE_FLOPS = CPU_FLOPS / 2
CPU_MEMORY, GPU_MEMORY = 14 * GB, 2000 * GB
# From pinned memory to a GPU, assumed.
PINNED = 20 * GB
# STREAM is the rate of a core on a fully loaded node, whose cores share its memory bandwidth; two cores alone reach
# 11.8 GB/s each.
STREAM, EXCHANGE, NETWORK, DISK = 6.4 * GB, 1.2 * GB, 1.2 * GB, 1.2 * GB


def decomposing_rate(cpus: float, gpus: float) -> float:
    """Return the FLOP/s of the decompositions of a node with these CPUs and GPUs."""
    return GPU_DECOMPOSING * gpus if gpus else CORE_FLOPS * cpus


# Placement of the task vectors: in the trainer's process, in shard actors on its node, or in shard actors on all nodes.
Site = Literal["trainer", "node", "nodes"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of memory.

    `model` is the trainer's weights and gradient alone; `logit_bytes` is the size of the logits that it computes at a
    time, in one copy; `step` is what an optimiser step adds to weights and factors, of which `activations` and
    `logits`, in all copies, are parts; `copied` are the base's matrices and factors that the trainer's GPU has no room
    for, copied to it in each pass; `least` is the trainer without any of these on its GPU; `trainer`, `expert` and
    `shard` are whole processes; `store` is Ray's object store; `page_cache` is that of a node which caches all that a
    pass reads.
    """

    model: float
    logit_bytes: int
    step: float
    activations: float
    logits: float
    least: float
    copied: float
    trainer: float
    expert: float
    shard: float
    store: float
    page_cache: float


@dataclass(frozen=True)
class StepEstimate:
    """Estimated seconds of an optimiser step: computing, streaming, moving, and in total, as the three may overlap."""

    compute: float
    stream: float
    exchange: float
    total: float


@dataclass(frozen=True)
class Prediction:
    """The estimates for one placement of the task vectors. `moved`: bytes per step, both directions together."""

    where: Site
    shards: int
    memory: MemoryEstimate
    moved: float
    step: StepEstimate
    run_seconds: float
