"""How long a healthy merge may be silent: the bound after which an actor that returns no result counts as hung.

The bound is far above the scaling model's estimate of the longest call, because a call that is only slow must never be
taken for one that hangs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from engine.planning.costs.flops import SVD_FLOPS, decompositions
from engine.planning.costs.rates import CORE_FLOPS, CPU_MEMORY, GB, GPU_MEMORY, MB, Site, decomposing_rate
from engine.planning.costs.scaling import Machines, Work, predict
from engine.planning.factors import decomposed
from engine.planning.plan import Plan
from engine.sizes import GROUPS_PER_CALL, MATRICES_PER_CALL, SENSITIVITIES

# Seconds. Processes start, import packages from network storage and compile kernels, on machines that others use too.
FLOOR = 900.0
# A healthy machine may be this many times slower than the model's rates: shared cores, cold storage, a small GPU.
SLOWER = 20.0
# Bytes per second of storage without `cluster.rates`: far away, cold, and read by every shard at the same time.
SLOW_DISK = 20 * MB
# FLOP of a weight-space method of whole matrices, per element, model and row or column: 300 steps with a product of
# matrices each, as in WUDI. Singular value decompositions take a thirtieth.
WHOLE_FLOPS = 600
# Passes of a sample through a matrix, of which the gradient of a Fisher information takes two. FLOP of a solution of
# equations with a matrix [I, I], per I³: its eigenvalues in float64.
PASSES, SOLVING_FLOPS = 3, 25


def patience(
    plan: Plan,
    machines: Machines,
    shards: int,
    work: Work | None = None,
    tokens: Sequence[Sequence[int]] = (),
) -> float:
    """Return `cluster.hang`, or the seconds without a result after which the actors of a merge count as hung.

    Args:
        plan: The plan.
        machines: The machines.
        shards: Number of shards.
        work: The calibration work of a learned merge.
        tokens: Numbers of tokens of the samples on which models run for statistics or block by block, given per expert.
    """
    given = plan.config.cluster.hang
    if given != "auto":
        return given
    cores = max(1.0, machines.cpus * machines.nodes / max(shards, machines.nodes))
    calls = [_reading(plan), _whole_matrices(plan, cores), _on_samples(plan, tokens, machines)]
    if work is not None:
        calls += [_decomposing(plan, machines, cores), _target(plan, work, machines), _step(plan, work, machines)]
    return max(FLOOR, SLOWER * max(calls))


def _reading(plan: Plan) -> float:
    """Return the seconds of a call that reads or hashes every model, with all shards on one disk."""
    models = [plan.base, *plan.experts]
    headers = [model.header for model in models] + [one.adapter.header for one in models if one.adapter is not None]
    return sum(tensor.nbytes for header in headers for tensor in header.tensors.values()) / _disk_rate(plan)


def _decomposing(plan: Plan, machines: Machines, cores: float) -> float:
    """Return the seconds of the longer call of the two that decompose the largest matrices.

    One reads several groups of an expert's matrices, with one decomposition each. The other makes the parts of one
    group orthogonal: two decompositions per matrix, and one for an expert's part that was damaged. All by LAPACK, which
    takes longer than matrix products: one matrix per core, or one after the other on a GPU.
    """
    shapes = [plan.base_header.tensors[name].shape for name in decomposed(plan)]
    flops = max((SVD_FLOPS * math.prod(shape) * min(shape) for shape in shapes), default=0.0)
    if machines.gpus:
        seconds = MATRICES_PER_CALL * flops / decomposing_rate(0, 1)
    else:
        seconds = math.ceil(MATRICES_PER_CALL / decompositions(plan, cores)) * flops / decomposing_rate(1, 0)
    return seconds * max(GROUPS_PER_CALL, 3)


def _whole_matrices(plan: Plan, cores: float) -> float:
    """Return the seconds of a call that writes a file, if the method or a step after it holds whole matrices."""
    if not any(method.footprint for method in plan.config.methods):
        return 0.0
    tensors = sorted(
        (tensor for tensor in plan.base_header.tensors.values() if len(tensor.shape) > 1 and tensor.numel),
        key=lambda tensor: -min(tensor.shape),
    )
    flops, room = 0.0, plan.config.max_shard_size
    for tensor in tensors:
        if room <= 0:
            break
        flops += WHOLE_FLOPS * (len(plan.experts) + 2) * float(tensor.numel) * min(tensor.shape)
        room -= tensor.nbytes
    return flops / (CORE_FLOPS * cores)


def _on_samples(plan: Plan, tokens: Sequence[Sequence[int]], machines: Machines) -> float:
    """Return the seconds of a call that collects statistics of a model, or that works on a block, on the CPU.

    Each token costs the passes through the matrices [O, I], and the moments of their inputs; for each block, weights
    are multiplied by the moments, and equations are solved. All blocks count, for statistics are one call.
    Sensitivities take passes for each part of the weights.
    """
    config = plan.config
    observed = config.statistics or config.statistics_of_base or config.compress is not None
    if not (observed or any(method.by_blocks for method in config.methods)):
        return 0.0
    counts = [sum(of_expert) for of_expert in tokens]
    most = sum(counts) if config.statistics_of_base else max(counts, default=0)
    if "sensitivity" in (*config.statistics, *config.statistics_of_base):
        samples = max(sum(map(len, tokens)) if config.statistics_of_base else 0, *map(len, tokens), 1)
        most *= math.ceil(samples * sum(t.numel for t in plan.base_header.tensors.values()) / SENSITIVITIES)
    flops = 0.0
    for tensor in plan.base_header.tensors.values():
        if len(tensor.shape) == 2:
            rows, columns = map(float, tensor.shape)
            flops += most * (PASSES * 2 * rows * columns + 4 * columns**2) + 2 * rows * columns**2
            flops += SOLVING_FLOPS * columns**3
    given = config.cluster.rates.compute_tflops
    return flops / (given * 1e12 if given else CORE_FLOPS * max(1.0, machines.cpus))


def _target(plan: Plan, work: Work, machines: Machines) -> float:
    """Return the seconds of an expert's first target: it is loaded, and generates a response token by token."""
    rates = plan.config.cluster.rates
    weights = sum(tensor.nbytes for tensor in plan.base_header.tensors.values())
    memory = rates.memory_gbs * GB if rates.memory_gbs else (GPU_MEMORY if machines.gpus else CPU_MEMORY)
    tokens = plan.config.calibration.generate_responses
    return weights / _disk_rate(plan) + tokens * weights / memory + _step(plan, work, machines)


def _step(plan: Plan, work: Work, machines: Machines) -> float:
    """Return the seconds of an optimiser step on the longest samples, wherever the task vectors are."""
    longest = replace(work, tokens=work.pass_tokens)
    places: tuple[Site, ...] = ("trainer", "node", "nodes")
    return max(predict(plan, longest, machines, where).step.total for where in places)


def _disk_rate(plan: Plan) -> float:
    given = plan.config.cluster.rates.disk_gbs
    return given * GB if given else SLOW_DISK * SLOWER
