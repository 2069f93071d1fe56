"""The keys of a config under `cluster`: resources of the actors, rates of the machines, and times to wait."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from engine.fields import Float, Int, Section

# The most shards and GPUs of an actor, and the smallest part of a GPU that Ray assigns.
SHARDS, GPUS, GPU_PART = 10_000, 1024, 0.0001
# The most seconds to wait (thirty years).
WAIT = 1_000_000_000
# Bounds of the rates of machines, in TFLOP/s and GB/s: with them no estimate overflows.
SLOWEST, FASTEST = 1e-9, 1e9
# What `num_gpus` accepts.
NUM_GPUS = f"auto, 0, a fraction of at least {GPU_PART} and below 1, or a whole number of at most {GPUS:,}"


def _gpus(value: float) -> float:
    """Refuse numbers of GPUs that Ray cannot assign."""
    if value and (value < GPU_PART or (value > 1 and value != int(value))):
        raise ValueError(NUM_GPUS)
    return value


class ActorResources(Section):
    """Resources that an actor requests.

    Attributes:
        num_gpus: Number of GPUs. `auto`: one if the cluster has GPUs, and more if the actor needs their memory.
        labels: Labels of the Ray nodes on which the actor may run.
    """

    num_gpus: Literal["auto"] | Annotated[Float, Field(ge=0, le=GPUS), AfterValidator(_gpus)] = "auto"
    labels: dict[str, str] = Field(default_factory=dict)


# How the passes of a window become one gradient: weight gradients are summed, or each pass has one of the coefficients.
GradientUse = Literal["auto", "accumulate", "stream"]
# Whether factors of task vectors are used: where they are faster, for every matrix that has them, or not at all.
Use = Literal["auto", "always", "never"]
Rate = Annotated[Float, Field(ge=SLOWEST, le=FASTEST)]


class Rates(Section):
    """Speed of the machines. None: a default for the kind of device is used (`engine.planning.costs.scaling`).

    The rates decide placement and the estimates of `plan`; they do not change the result. 1 GB is 1e9 bytes.

    Attributes:
        compute_tflops: TFLOP/s of the device that computes.
        memory_gbs: GB/s between that device and its memory.
        stream_gbs: GB/s of checkpoints that one core streams.
        exchange_gbs: GB/s between processes of a node.
        network_gbs: GB/s between nodes.
        disk_gbs: GB/s of a disk.
    """

    compute_tflops: Rate | None = None
    memory_gbs: Rate | None = None
    stream_gbs: Rate | None = None
    exchange_gbs: Rate | None = None
    network_gbs: Rate | None = None
    disk_gbs: Rate | None = None


class Cluster(Section):
    """Resources of the actors, rates of the machines, and the times to wait for resources and for results.

    Attributes:
        expert: Resources of an expert actor.
        trainer: Resources of each trainer.
        trainers: Number of trainers, which compute the passes of a window at the same time. `auto`: as many as the
            scaling model estimates to be fastest; on a CPU one.
        shards: Number of shard actors. 0: the trainer streams the task vectors in its own process.
        labels: Labels of the Ray nodes that the merge may use.
        factors: Merge matrices through factors of their task vectors, which the trainer holds on its own device (see
            docs/scaling.md). `auto`: on a GPU, and on a CPU where it is faster.
        rates: Speed of the machines.
        wait: Seconds to wait for resources.
        hang: Seconds without a result after which the actors count as hung. `auto`: far above the estimated time of
            the longest call (`engine.planning.costs.patience`).
    """

    expert: ActorResources = ActorResources()
    trainer: ActorResources = ActorResources()
    trainers: Literal["auto"] | Annotated[Int, Field(ge=1, le=GPUS)] = "auto"
    shards: Literal["auto"] | Annotated[Int, Field(ge=0, le=SHARDS)] = "auto"
    labels: dict[str, str] = Field(default_factory=dict)
    factors: Use = "auto"
    rates: Rates = Rates()
    wait: Annotated[Float, Field(ge=0, le=WAIT)] = 600.0
    hang: Literal["auto"] | Annotated[Float, Field(gt=0, le=WAIT)] = "auto"
