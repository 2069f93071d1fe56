"""The scaling model: memory, traffic and time of a merge, from its plan and its machines.

What it says is derived and checked against measured runs in docs/scaling.md; `plan` prints it, and `shards: auto` picks
the least of its times. Knows neither torch nor Ray. Units: bytes, seconds, FLOP; rates of them per second.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.headers import BYTES, FLOATS, SAFETENSORS, ModelHeader
from engine.config.schema import Config
from engine.machine import usable_cpus
from engine.planning.flops import kept_elements, orthogonal_bytes, orthogonal_flops, sample_flops
from engine.planning.plan import ExpertPlan, Plan
from engine.planning.schedule import passes, training_order, windows
from engine.sizes import BLOCK, GROUP, IN_FLIGHT, LOGIT_BYTES, WINDOW_BYTES, bucket_bytes

# Where the task vectors are asked: in the trainer's process, by actors on its node, or by actors on every node.
Site = Literal["trainer", "node", "nodes"]


MB, GB = 1e6, 1e9


# Anonymous memory of processes before they have anything of a model (torch, transformers, Ray, compiled kernels).
TRAINER_BYTES, SHARD_BYTES = 360 * MB, 300 * MB


# Copies of the logits that stand at one time: the model's, both logarithms, what becomes the gradient.
LOGIT_COPIES = 4


# The interpreter's part of one block of one expert; its lock lets one thread at a time have it.
CALL_SECONDS = 1.2e-6


# Its part of opening a tensor of an expert, of a layer forward and backward, and of an optimiser step.
OPEN_SECONDS, LAYER_SECONDS, STEP_SECONDS = 18e-6, 2e-3, 0.03


# A process until it answers (imports), on a machine whose cores it has.
START_SECONDS = 6.0


# FLOP/s and bytes/s where the config's `cluster.rates` says nothing: measured on two cores of an EPYC without GPU; for
# a GPU an assumption, a quarter of an H200's dense bfloat16 rate, as single samples reach. Streaming is that of a core
# of a full node, whose cores share its memory; two cores alone reach 11.8 GB/s each.
CPU_FLOPS, GPU_FLOPS = 177e9, 200e12


CORE_FLOPS = CPU_FLOPS / 2


CPU_MEMORY, GPU_MEMORY = 14 * GB, 2000 * GB


STREAM, EXCHANGE, NETWORK, DISK = 6.4 * GB, 1.2 * GB, 1.2 * GB, 1.2 * GB


@dataclass(frozen=True)
class Machines:
    """A cluster of equal nodes; `memory` and `gpu_memory` of a node and of a GPU, None where not known."""

    nodes: int
    cpus: float
    gpus: float
    memory: float | None = None
    gpu_memory: float | None = None

    @classmethod
    def here(cls) -> Machines:
        """This machine alone."""
        gpus = len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()])
        return cls(1, usable_cpus(), gpus, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True)
class Work:
    """What there is to learn from: mean tokens of a sample, samples in all, optimiser steps of a stage; passes through
    the model of a step, on average, and the most tokens that one of them has, filled up.
    """

    tokens: float
    samples: int
    steps: int
    passes: float
    pass_tokens: int

    @classmethod
    def of(cls, config: Config, tokens: Sequence[Sequence[int]]) -> Work:
        """From the tokens of each expert's samples."""
        counts = [count for mine in tokens for count in mine]
        order = training_order([len(mine) for mine in tokens], epochs=1)
        window = config.parameters.gradient_accumulation
        together = [
            [max(some[place] for place in places) * len(places) for places in passes(some, config.batch_tokens)]
            for some in ([tokens[k][i] for k, i in part] for part in windows(order, window))
        ]
        return cls(
            tokens=sum(counts) / len(counts),
            samples=len(counts),
            steps=math.ceil(len(order) * config.parameters.epochs / window),
            passes=sum(map(len, together)) / len(together),
            pass_tokens=max(max(step) for step in together),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by process: of the trainer's weights and gradient alone, of each whole process, and of the page cache."""

    model: float
    trainer: float
    expert: float
    shard: float
    store: float
    page_cache: float


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of an optimiser step: computing, reading checkpoints, moving bytes; `total` knows what overlaps."""

    compute: float
    stream: float
    exchange: float
    total: float


@dataclass(frozen=True)
class Prediction:
    """What the model says of one way to place the task vectors; `moved` are bytes of a step, in both directions."""

    where: Site
    shards: int
    memory: MemoryEstimate
    moved: float
    step: StepEstimate
    run_seconds: float


def predict(plan: Plan, work: Work, machines: Machines, where: Site) -> Prediction:
    """Memory, traffic and time with the task vectors at `where`."""
    shards = _shards(plan, machines, where)
    step = _step(plan, work, machines, where, shards)
    return Prediction(
        where,
        shards,
        _memory(plan, work, machines, where, shards),
        0 if where == "trainer" else _streams(plan, work) * plan.merged_bytes,
        step,
        _run(plan, work, machines, step),
    )


def choose(plan: Plan, work: Work, machines: Machines) -> Prediction:
    """The way that takes the least time for a step; of equals the one with fewer processes."""
    ways: list[Site] = ["trainer", "node", "nodes"] if machines.nodes > 1 else ["trainer", "node"]
    wanted = plan.config.cluster.shards
    if wanted != "auto":
        ways = ["nodes" if machines.nodes > 1 else "node"] if wanted else ["trainer"]
    return min((predict(plan, work, machines, where) for where in ways), key=lambda found: found.step.total)


def shortages(plan: Plan, found: Prediction, machines: Machines) -> list[str]:
    """What would not fit, a line each, and what would help; a limit that is not known is not judged."""
    memory, lines = found.memory, []
    saves = [] if plan.config.gradients == "stream" else ["`gradients: stream`"]
    saves += [] if plan.config.gradient_checkpointing else ["`gradient_checkpointing: true`"]
    saves += ["`dtype: bfloat16`"] if plan.dtype == "float32" else []
    kind, limit = ("GPU", machines.gpu_memory) if machines.gpus else ("node", machines.memory)
    if limit is not None:
        cluster = plan.config.cluster
        for role, wanted, asked in (
            ("trainer", memory.trainer, cluster.trainer.num_gpus),
            ("expert", memory.expert, cluster.expert.num_gpus),
        ):
            devices = asked if machines.gpus and asked != "auto" and asked > 1 else 1
            if wanted > limit * devices:
                helps = f"; {' or '.join(saves)} would make it smaller" if role == "trainer" and saves else ""
                helps += f"; or more GPUs: `cluster.{role}.num_gpus`" if machines.gpus else ""
                have = f"{devices:g} {kind}s have" if devices > 1 else f"a {kind} has"
                lines.append(f"the {role} wants {wanted / GB:.1f} GB, and {have} {limit * devices / GB:.1f} GB{helps}")
    if machines.memory is not None:
        if memory.shard > machines.memory:
            lines.append(f"a shard wants {memory.shard / GB:.1f} GB, and a node has {machines.memory / GB:.1f} GB")
        if memory.page_cache > machines.memory:
            lines.append(
                f"each node reads {memory.page_cache / GB:.1f} GB of checkpoints a pass and has "
                f"{machines.memory / GB:.1f} GB to keep them in: passes go at the disk's speed; more nodes help"
            )
    return lines


def _shards(plan: Plan, machines: Machines, where: Site) -> int:
    wanted = plan.config.cluster.shards
    if wanted != "auto":
        return max(1, wanted)
    if where == "trainer":
        return 1  # it reads and writes files
    # As many processes a node as its cores need, where one interpreter's lock would hold them up.
    a_node = max(1, math.ceil(machines.cpus * _stream_rate(plan) / _interpreter_rate(plan)))
    return a_node * (machines.nodes if where == "nodes" else 1)


def _memory(plan: Plan, work: Work, machines: Machines, where: Site, shards: int) -> MemoryEstimate:
    header, item = plan.base_header, _item(plan)
    elements = sum(tensor.numel for tensor in header.tensors.values())
    on_gpu = bool(machines.gpus)
    # On a CPU, tensors that are not merged are views of the base's files where they have the run's dtype already.
    mapped = 0 if on_gpu else sum(t.nbytes for n, t in header.tensors.items() if _mapped(plan, n))
    weights = elements * item - mapped
    bucket = bucket_bytes(shards, item)
    gradient = min(plan.merged_bytes, WINDOW_BYTES) if plan.config.gradients == "stream" else plan.merged_bytes
    activations = work.pass_tokens * kept_elements(plan) * (4 if item == 4 else 2)
    logits = min(LOGIT_BYTES, 4 * work.tokens * (header.vocab_size or 0)) * LOGIT_COPIES
    scratch = 4 * BLOCK * (3 + GROUP) * machines.cpus
    return MemoryEstimate(
        model=weights + gradient,
        trainer=TRAINER_BYTES + weights + gradient + activations + logits + (scratch if where == "trainer" else bucket),
        expert=TRAINER_BYTES
        + elements * item * (1 if on_gpu else 0)
        + work.tokens * (header.vocab_size or 0) * item * 3,
        # A bucket that came and one that goes.
        shard=SHARD_BYTES
        + scratch
        + max(0 if where == "trainer" else 2 * bucket, orthogonal_bytes(plan, machines.cpus)),
        store=0 if where == "trainer" else IN_FLIGHT * shards * bucket,
        page_cache=_read_bytes(plan) / (min(shards, machines.nodes) if where == "nodes" else 1),
    )


def _step(plan: Plan, work: Work, machines: Machines, where: Site, shards: int) -> StepEstimate:
    rates, samples = plan.config.cluster.rates, _window(plan)
    flops, (forward, backward) = _flop_rate(plan, machines), sample_flops(plan, work.tokens)
    # What a pass takes whatever its tokens: weights are read twice, their gradient is written, and added to the others
    # where it stays.
    weights = _item(plan) * sum(tensor.numel for tensor in plan.base_header.tensors.values())
    memory = rates.memory_gbs * GB if rates.memory_gbs else (GPU_MEMORY if machines.gpus else CPU_MEMORY)
    added = 0 if plan.config.gradients == "stream" else work.passes - 1
    moved = work.passes * (2 * weights + plan.merged_bytes) + added * 3 * plan.merged_bytes
    called = STEP_SECONDS + work.passes * LAYER_SECONDS * (plan.base_header.num_layers or 0)
    compute = samples * (forward + backward) / flops + moved / memory + called
    streams = _streams(plan, work)
    nodes = machines.nodes if where == "nodes" else 1
    processes = 1 if where == "trainer" else max(1, shards / nodes)
    # A node's cores stream side by side, as far as their interpreters let them; nodes side by side in any case.
    rate = min(machines.cpus * _stream_rate(plan), processes * _interpreter_rate(plan)) * nodes
    if machines.memory is not None and _read_bytes(plan) / nodes > machines.memory:
        rate = min(rate, (rates.disk_gbs or DISK / GB) * GB * nodes)
    opened = len(plan.experts) * len(plan.merged) / (processes * nodes)
    stream = streams * (_streamed(plan) / rate + opened * OPEN_SECONDS)
    link = (rates.network_gbs or NETWORK / GB) if where == "nodes" else (rates.exchange_gbs or EXCHANGE / GB)
    exchange = 0 if where == "trainer" else streams * plan.merged_bytes / (link * GB)
    # Streams and transfers work side by side. On a GPU's trainer they also overlap the forward pass that comes first
    # and the backward pass that comes last (or each); on a CPU's trainer they want the cores that it computes with.
    if not machines.gpus:
        total = compute + stream + exchange
    else:
        each, share = max(stream, exchange) / streams, samples / work.passes / flops
        hidden = min(each, share * forward) + (streams - 1) * min(each, share * backward)
        total = compute + streams * each - hidden
    return StepEstimate(compute, stream, exchange, total)


def _run(plan: Plan, work: Work, machines: Machines, step: StepEstimate) -> float:
    """A whole run: start, one reading of everything, targets, the stages, and the output."""
    rates = plan.config.cluster.rates
    disk = (rates.disk_gbs or DISK / GB) * GB
    slots = max(1, min(len(plan.experts), machines.gpus * machines.nodes or machines.nodes))
    whole = sum(tensor.nbytes for tensor in plan.base_header.tensors.values())
    reading = _read_bytes(plan) / (disk * machines.nodes)
    targets = (
        len(plan.experts) * whole / disk
        + work.samples * sample_flops(plan, work.tokens)[0] / _flop_rate(plan, machines)
    ) / slots
    if not plan.config.has_targets:
        targets = 0.0
    orthogonal = orthogonal_flops(plan) / (CORE_FLOPS * machines.cpus * machines.nodes)
    orthogonal += sum(plan.numels[name] for name in plan.orthogonal) * len(plan.experts) * _item(plan) / disk
    stages = plan.config.stages * work.steps * step.total
    return 3 * START_SECONDS + reading + targets + orthogonal + stages + whole / disk


def _flop_rate(plan: Plan, machines: Machines) -> float:
    given = plan.config.cluster.rates.compute_tflops
    return given * 1e12 if given else (GPU_FLOPS if machines.gpus else CPU_FLOPS)


def _streamed(plan: Plan) -> float:
    """Bytes that one pass over base and experts goes through; an adapter counts as what it takes to multiply out."""
    base = sum(plan.base_header.tensors[name].nbytes for name in plan.merged)
    return 2 * base + sum(_expert_bytes(plan, expert) for expert in plan.experts)


def _expert_bytes(plan: Plan, expert: ExpertPlan) -> float:
    if isinstance(expert.header, ModelHeader):
        return sum(expert.header.tensors[name].nbytes for name in plan.merged)
    # A product of two factors of rank r: 2r FLOP an element, which takes a core about as long as 2r/4 bytes.
    ranks = {name: expert.header.tensors[pair.a].shape[0] for name, pair in expert.header.pairs.items()}
    return sum(plan.numels[name] * 2 * rank / 4 for name, rank in ranks.items() if name in plan.merged_set)


def _read_bytes(plan: Plan) -> float:
    """Bytes of base and experts in their files: what the page cache would hold."""
    total = 0.0
    for model in (plan.base, *plan.experts):
        header: ModelHeader | AdapterHeader = model.header
        total += sum(tensor.nbytes for tensor in header.tensors.values())
    return total


def _stream_rate(plan: Plan) -> float:
    """Bytes of checkpoints a second that one core streams through."""
    given = plan.config.cluster.rates.stream_gbs
    return given * GB if given else STREAM


def _interpreter_rate(plan: Plan) -> float:
    """Bytes a second at which one process's interpreter can hand out blocks, however many cores it has."""
    return BLOCK * _item(plan) / CALL_SECONDS


def _item(plan: Plan) -> int:
    return BYTES[SAFETENSORS[plan.dtype]]


def _streams(plan: Plan, work: Work) -> float:
    """How often a step goes through the experts: once to merge, and once for each gradient that leaves."""
    return 1 + (work.passes if plan.config.gradients == "stream" else 1)


def _window(plan: Plan) -> int:
    return plan.config.parameters.gradient_accumulation


def _mapped(plan: Plan, name: str) -> bool:
    dtype = plan.base_header.tensors[name].dtype
    return name not in plan.merged_set and (dtype not in FLOATS or FLOATS[dtype] == plan.dtype)
