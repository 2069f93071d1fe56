"""The scaling model: estimated memory, traffic and time of a merge, from its plan and its machines.

docs/scaling.md derives the model and compares it with measured runs. `plan` prints the estimates, and `shards: auto`
chooses the placement with the smallest step time. Units: bytes, seconds, FLOP; rates are per second.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.checkpoints.headers import BYTES, FLOATS, SAFETENSORS
from engine.config.schema import Config
from engine.machine import usable_cpus, usable_gpus, usable_memory
from engine.planning.costs.disk import target_bytes
from engine.planning.costs.flops import kept_elements, orthogonal_bytes, orthogonal_flops, sample_flops, step_bytes
from engine.planning.costs.rates import (
    CPU_FLOPS,
    CPU_MEMORY,
    DISK,
    EXCHANGE,
    GB,
    GPU_FLOPS,
    GPU_MEMORY,
    MB,
    NETWORK,
    PINNED,
    STREAM,
    MemoryEstimate,
    Prediction,
    Site,
    StepEstimate,
    decomposing_rate,
)
from engine.planning.costs.reading import read_bytes, streamed
from engine.planning.factors import factor_bytes, factor_flops, factored, ranks, stored_bytes
from engine.planning.plan import Plan
from engine.planning.schedule import passes, training_order, windows
from engine.sizes import BLOCK, GROUP, IN_FLIGHT, LOGIT_BYTES, TARGET_BYTES, WINDOW_BYTES, bucket_bytes, gpu_logit_bytes

# Anonymous memory of a process before it loads a model: torch, transformers, Ray, compiled kernels.
TRAINER_BYTES, SHARD_BYTES = 360 * MB, 300 * MB

# Simultaneous copies of the logits: those of the model, two log-softmaxes, and the buffer of the gradient.
LOGIT_COPIES = 4

# Interpreter time per block of an expert. The interpreter lock serialises it over the threads of a process.
CALL_SECONDS = 1.2e-6

# Interpreter time to open a tensor of an expert, per layer forward and backward, and per optimiser step.
OPEN_SECONDS, LAYER_SECONDS, STEP_SECONDS = 18e-6, 2e-3, 0.03

# Start of a process (imports) on idle cores.
START_SECONDS = 6.0


@dataclass(frozen=True)
class Machines:
    """A cluster of equal nodes.

    `cpus`, `gpus` and `memory` (in bytes) are those of a node, `gpu_memory` (in bytes) that of a GPU; None: unknown.
    `trainers` compute the passes of a window at the same time.
    """

    nodes: int
    cpus: float
    gpus: float
    memory: float | None = None
    gpu_memory: float | None = None
    trainers: int = 1

    @classmethod
    def here(cls) -> Machines:
        """Return this machine as a cluster of one node."""
        return cls(1, usable_cpus(), usable_gpus(), usable_memory())


@dataclass(frozen=True)
class Work:
    """The calibration work of a learned merge.

    Mean tokens per sample, number of samples of all experts, optimiser steps per stage, mean passes through the model
    per step, and tokens of the largest pass, padding included.
    """

    tokens: float
    samples: int
    steps: int
    passes: float
    pass_tokens: int

    @classmethod
    def of(cls, config: Config, tokens: Sequence[Sequence[int]], limit: int) -> Work:
        """Return the work for samples with these numbers of tokens, given per expert. `limit`: see `pass_limit`."""
        counts = [count for of_expert in tokens for count in of_expert]
        order = training_order([len(of_expert) for of_expert in tokens], epochs=1)
        window = config.parameters.gradient_accumulation
        together = [
            [max(some[index] for index in indices) * len(indices) for indices in passes(some, limit)]
            for some in ([tokens[k][i] for k, i in part] for part in windows(order, window))
        ]
        return cls(
            tokens=sum(counts) / len(counts),
            samples=len(counts),
            steps=math.ceil(len(order) * config.parameters.epochs / window),
            passes=sum(map(len, together)) / len(together),
            pass_tokens=max(max(step) for step in together),
        )


def predict(plan: Plan, work: Work, machines: Machines, where: Site) -> Prediction:
    """Estimate memory, traffic and time with the task vectors placed at `where`."""
    shards, factors = _shards(plan, machines, where), _factored(plan, machines)
    memory = _memory(plan, work, machines, where, shards)
    step = _step(plan, work, machines, where, shards, memory.copied)
    return Prediction(
        where,
        shards,
        memory,
        0 if where == "trainer" else _streams(plan, work.passes, machines.trainers) * _moved(plan, factors),
        step,
        _run(plan, work, machines, step),
    )


def choose(plan: Plan, work: Work, machines: Machines) -> Prediction:
    """Return the placement with the smallest step time; of equal ones, that with fewer processes."""
    sites: list[Site] = ["trainer", "node", "nodes"] if machines.nodes > 1 else ["trainer", "node"]
    shards = plan.config.cluster.shards
    if shards != "auto":
        sites = ["nodes" if machines.nodes > 1 else "node"] if shards else ["trainer"]
    return min((predict(plan, work, machines, where) for where in sites), key=lambda estimate: estimate.step.total)


def _shards(plan: Plan, machines: Machines, where: Site) -> int:
    shards = plan.config.cluster.shards
    if shards != "auto":
        return max(1, shards)
    if where == "trainer":
        return 1  # inspects the inputs and writes the output
    # As many processes per node as keep the interpreter lock from limiting its cores.
    per_node = max(1, math.ceil(machines.cpus * _stream_rate(plan) / _interpreter_rate(plan)))
    return per_node * (machines.nodes if where == "nodes" else 1)


def _memory(plan: Plan, work: Work, machines: Machines, where: Site, shards: int) -> MemoryEstimate:
    header, item = plan.base_header, _item(plan)
    elements = sum(tensor.numel for tensor in header.tensors.values())
    on_gpu = bool(machines.gpus)
    # On a CPU, tensors that are not merged stay views of the base's files if they have the run's dtype.
    mapped = 0 if on_gpu else sum(t.nbytes for n, t in header.tensors.items() if _mapped(plan, n))
    weights = elements * item - mapped
    bucket = bucket_bytes(shards, item)
    gradient = min(plan.merged_bytes, WINDOW_BYTES) if plan.config.gradients == "stream" else plan.merged_bytes
    activations = work.pass_tokens * kept_elements(plan) * (4 if item == 4 else 2)
    free = _trainer_memory(plan, machines) - weights - gradient - activations
    limit = gpu_logit_bytes(free / LOGIT_COPIES) if on_gpu else LOGIT_BYTES
    logits = min(limit, 4 * work.tokens * (header.vocab_size or 0)) * LOGIT_COPIES
    scratch = 4 * BLOCK * (3 + GROUP) * machines.cpus
    factors = _factored(plan, machines)
    dense = len(factors) < len(plan.merged)
    exchange = (scratch if where == "trainer" else bucket) if dense else 0
    held = factor_bytes(plan, factors) + sum(plan.numels[name] for name in factors) * item
    targets = min(TARGET_BYTES, target_bytes(plan, work.tokens * work.samples)) if on_gpu else 0
    step = gradient + activations + logits + targets + max((_products(plan, name) for name in factors), default=0)
    least = TRAINER_BYTES + weights + step + exchange
    resident = min(held, max(0.0, _trainer_memory(plan, machines) - least)) if on_gpu else 0
    # On a CPU, the threads of a survey decompose matrices in the expert's process.
    survey = 0 if on_gpu else orthogonal_bytes(plan, machines.cpus)
    return MemoryEstimate(
        model=weights + gradient,
        logit_bytes=limit,
        step=step,
        activations=activations,
        logits=logits,
        least=least,
        trainer=least + resident,
        copied=held - resident if on_gpu else 0,
        expert=TRAINER_BYTES
        + elements * item * (1 if on_gpu else 0)
        + max(survey, work.tokens * (header.vocab_size or 0) * item * 3),
        # One bucket received and one to send.
        shard=SHARD_BYTES
        + scratch
        + max(
            0 if where == "trainer" else 2 * bucket,
            orthogonal_bytes(plan, machines.cpus),
            step_bytes(plan, machines.cpus),
        ),
        store=0 if where == "trainer" else IN_FLIGHT * shards * bucket,
        page_cache=(read_bytes(plan) / (min(shards, machines.nodes) if where == "nodes" else 1) if dense else 0)
        + (0 if on_gpu else held),
    )


def _step(plan: Plan, work: Work, machines: Machines, where: Site, shards: int, copied: float) -> StepEstimate:
    rates, share = plan.config.cluster.rates, _largest_share(work, machines)
    samples, passes = plan.config.parameters.gradient_accumulation * share, work.passes * share
    flops, (forward, backward) = _flop_rate(plan, machines), sample_flops(plan, work.tokens)
    # Memory traffic that does not depend on the tokens: a pass reads the weights twice and writes their gradient. With
    # `accumulate`, all but the first pass also add the gradient to the sum: two reads and a write.
    weights = _item(plan) * sum(tensor.numel for tensor in plan.base_header.tensors.values())
    memory = rates.memory_gbs * GB if rates.memory_gbs else (GPU_MEMORY if machines.gpus else CPU_MEMORY)
    added = 0 if plan.config.gradients == "stream" else passes - 1
    moved = passes * (2 * weights + plan.merged_bytes) + added * 3 * plan.merged_bytes
    streams, factors = _streams(plan, passes), _factored(plan, machines)
    moved += streams * factor_bytes(plan, factors)
    called = STEP_SECONDS + passes * LAYER_SECONDS * (plan.base_header.num_layers or 0)
    products = streams * factor_flops(plan, factors)
    compute = (samples * (forward + backward) + products) / flops + moved / memory + called + streams * copied / PINNED
    nodes = machines.nodes if where == "nodes" else 1
    processes = 1 if where == "trainer" else max(1, shards / nodes)
    # The cores of a node stream in parallel up to the limit of their interpreters. Nodes always stream in parallel.
    rate = min(machines.cpus * _stream_rate(plan), processes * _interpreter_rate(plan)) * nodes
    if machines.memory is not None and read_bytes(plan) / nodes > machines.memory:
        rate = min(rate, (rates.disk_gbs or DISK / GB) * GB * nodes)
    dense = plan.merged_set.difference(factors)
    opened = len(plan.experts) * len(dense) / (processes * nodes)
    # Several trainers stream and move over the same shards, each of them its own passes.
    served = _streams(plan, work.passes, machines.trainers)
    stream = served * (streamed(plan, dense) / rate + opened * OPEN_SECONDS)
    link = (rates.network_gbs or NETWORK / GB) if where == "nodes" else (rates.exchange_gbs or EXCHANGE / GB)
    exchange = 0 if where == "trainer" else served * _moved(plan, factors) / (link * GB)
    # Streaming and moving run in parallel. With a trainer on a GPU they also overlap with the first forward pass and
    # the last backward pass (with `stream`, with each backward pass). On a CPU all three use the same cores.
    if not machines.gpus:
        total = compute + stream + exchange
    else:
        each, one = max(stream, exchange) / streams, samples / passes / flops
        hidden = min(each, one * forward) + (streams - 1) * min(each, one * backward)
        total = compute + streams * each - hidden
    return StepEstimate(compute, stream, exchange, total)


def _run(plan: Plan, work: Work, machines: Machines, step: StepEstimate) -> float:
    """Return the seconds of a whole run: start, one read of all weights, targets, stages and output."""
    rates = plan.config.cluster.rates
    disk = (rates.disk_gbs or DISK / GB) * GB
    slots = max(1, min(len(plan.experts), machines.gpus * machines.nodes or machines.nodes))
    whole = sum(tensor.nbytes for tensor in plan.base_header.tensors.values())
    reading = read_bytes(plan) / (disk * machines.nodes)
    targets = (
        len(plan.experts) * whole / disk
        + work.samples * sample_flops(plan, work.tokens)[0] / _flop_rate(plan, machines)
    ) / slots
    targets *= plan.config.has_targets
    orthogonal = orthogonal_flops(plan) / (decomposing_rate(machines.cpus, machines.gpus) * machines.nodes)
    orthogonal += stored_bytes(plan, _factored(plan, machines)) / disk
    stages = plan.config.stages * work.steps * step.total
    return 3 * START_SECONDS + reading + targets + orthogonal + stages + whole / disk


def _flop_rate(plan: Plan, machines: Machines) -> float:
    given = plan.config.cluster.rates.compute_tflops
    return given * 1e12 if given else (GPU_FLOPS if machines.gpus else CPU_FLOPS)


def _factored(plan: Plan, machines: Machines) -> tuple[str, ...]:
    return factored(plan, machines.gpus > 0, plan.config.cluster.factors)


def _trainer_memory(plan: Plan, machines: Machines) -> float:
    """Return the bytes of the trainer's GPUs; infinite if unknown."""
    requested = plan.config.cluster.trainer.num_gpus
    return (machines.gpu_memory or math.inf) * (requested if requested != "auto" and requested > 1 else 1)


def _moved(plan: Plan, factors: Collection[str]) -> float:
    """Return the bytes of the merged tensors that have no factors, in the run's dtype."""
    return plan.merged_bytes - sum(plan.numels[name] for name in factors) * _item(plan)


def _products(plan: Plan, name: str) -> int:
    """Return the bytes of the products and float32 copies with which a matrix is merged through factors."""
    rows, columns = plan.base_header.tensors[name].shape
    rank = sum(ranks(plan, name))
    copies = 1 if plan.dtype == "float32" else 2
    return 4 * (copies * rows * (columns + rank) + (copies - 1) * rank * columns)


def _stream_rate(plan: Plan) -> float:
    """Return the bytes/s of checkpoints that one core streams."""
    given = plan.config.cluster.rates.stream_gbs
    return given * GB if given else STREAM


def _interpreter_rate(plan: Plan) -> float:
    """Return the bytes/s at which the interpreter of one process can dispatch blocks, whatever the number of cores."""
    return BLOCK * _item(plan) / CALL_SECONDS


def _item(plan: Plan) -> int:
    return BYTES[SAFETENSORS[plan.dtype]]


def _streams(plan: Plan, passes: float, trainers: int = 1) -> float:
    """Return the passes over the experts per step: one for the merge of each trainer, and one per gradient sent."""
    return trainers + (passes if plan.config.gradients == "stream" else 1)


def _largest_share(work: Work, machines: Machines) -> float:
    """Return the share of a window's passes that the slowest trainer computes."""
    return min(1.0, math.ceil(work.passes / machines.trainers) / work.passes)


def _mapped(plan: Plan, name: str) -> bool:
    dtype = plan.base_header.tensors[name].dtype
    return name not in plan.merged_set and (dtype not in FLOATS or FLOATS[dtype] == plan.dtype)
