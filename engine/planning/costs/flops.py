"""Estimates for the scaling model: FLOP of a sample, cost of orthogonal task vectors, activations of a token."""

from __future__ import annotations

import math
from typing import Any

from engine.checkpoints.structure import Role
from engine.methods.corrections import CORRECTIONS
from engine.planning.factors import decomposed, ranks
from engine.planning.plan import Plan, experts_of, method_at
from engine.sizes import (
    DECOMPOSING_BYTES,
    GROUPS_PER_CALL,
    ISOMETRY_SIDE,
    MATRICES_PER_CALL,
    are_few,
)

# FLOP of a decomposition of a matrix, per element and row or column of the smaller side, by the time of a product of
# matrices: of LAPACK's singular values and vectors, and by matrix products of the leading parts and of the nearest
# isometry. Measured on one core: 15.8, 2.2 and 8.4 products of 2n³ for n = 4096.
SVD_FLOPS, LEADING_FLOPS, ISOMETRY_FLOPS = 31.6, 4.4, 16.8
# Peak number of matrices of the input's size that a decomposition holds, input and results included. Measured.
SVD_COPIES = 8


def sample_flops(plan: Plan, tokens: float) -> tuple[float, float]:
    """Return the FLOP of one sample in the forward and in the backward pass.

    The logits of the target are included. Only merged tensors have a weight gradient.
    """
    header, config = plan.base_header, plan.base_header.text_config
    hidden, layers = int(config.get("hidden_size") or 0), header.num_layers or 0
    # Embedding lookups, sums and scalings are negligible. The head is a product, tied or not, and is counted apart.
    share = _share(config)
    every = {name: tensor.numel for name, tensor in header.tensors.items() if len(tensor.shape) in (2, 3)}
    seen = {name: numel * share if ".experts." in name else numel for name, numel in every.items()}
    outside = {Role.EMBEDDING, Role.HEAD, Role.POSITION}
    body = sum(numel for name, numel in seen.items() if "embed" not in name and header.roles.get(name) not in outside)
    merged = sum(seen[name] for name in plan.merged if name in seen)
    head, attention = hidden * (header.vocab_size or 0), 2 * layers * hidden * tokens
    forward = tokens * (2 * body + 4 * head + 2 * attention)
    return forward, tokens * (2 * body + 2 * merged + 2 * head + 4 * attention)


def decompositions(plan: Plan, cpus: float) -> int:
    """Return how many matrices a process decomposes at a time: one per core, in at most DECOMPOSING_BYTES, at least 1.

    The number has no influence on the results.
    """
    largest = max((plan.numels[name] for name in decomposed(plan)), default=0)
    return max(1, min(int(cpus), MATRICES_PER_CALL * GROUPS_PER_CALL, fitting(largest)))


def fitting(numel: int) -> int:
    """Return how many matrices of so many elements can be decomposed at a time in DECOMPOSING_BYTES, at least 1."""
    return max(1, DECOMPOSING_BYTES // (4 * SVD_COPIES * max(1, numel)))


def step_bytes(plan: Plan, cpus: float) -> float:
    """Return the bytes of the whole matrices of a shard that takes steps after a merge; 0 without any.

    These are matrices at work, and changed ones that wait to be written.
    """
    if not any(CORRECTIONS[one.method].footprint for one in plan.config.calibrate):
        return 0
    largest = max((plan.numels[name] for name in plan.matrices), default=0)
    return 4 * largest * (SVD_COPIES * min(cpus, fitting(largest)) + cpus)


def most_work(plan: Plan) -> tuple[str, int]:
    """Return the merged tensor on which a weight-space method holds most, and the bytes; ('', 0) if it holds none."""
    needs = {name: work_bytes(plan, name) for name in plan.merged}
    largest = max(needs, key=lambda name: needs[name], default="")
    return (largest, needs[largest]) if largest and needs[largest] else ("", 0)


def work_bytes(plan: Plan, name: str) -> int:
    """Return the bytes that a weight-space method holds at work on a tensor, if it works on whole tensors, else 0."""
    method, shape = method_at(plan, name), plan.base_header.tensors[name].shape
    return method.footprint.nbytes(shape, len(experts_of(plan, name))) if method.footprint else 0


def orthogonal_bytes(plan: Plan, cpus: float) -> float:
    """Return the bytes of a process that decomposes matrices, or makes the parts of all experts orthogonal.

    These are the decompositions that run at a time, and one expert's parts of the matrices of one call.
    """
    largest = max((plan.numels[name] for name in decomposed(plan)), default=0)
    return 4 * largest * (SVD_COPIES * decompositions(plan, cpus) + 2 * MATRICES_PER_CALL / len(plan.experts))


def _share(config: dict[str, Any]) -> float:
    """Return the share of a mixture's experts that process a token."""
    count, chosen = config.get("num_experts", config.get("num_local_experts")), config.get("num_experts_per_tok")
    return chosen / count if type(chosen) is int and type(count) is int and count else 1.0


def kept_elements(plan: Plan) -> float:
    """Return the number of activation elements per token that a Llama-like model keeps for the backward pass.

    With gradient checkpointing these are the inputs of all blocks and the activations of one block.
    """
    config = plan.base_header.text_config
    hidden, layers = int(config.get("hidden_size") or 0), plan.base_header.num_layers or 0
    inner = int(config.get("intermediate_size") or 4 * hidden)
    block = 12 * hidden + 5 * inner
    return layers * hidden + block if plan.config.gradient_checkpointing else layers * block


def orthogonal_flops(plan: Plan) -> float:
    """Return the FLOP of making the task vectors orthogonal.

    These are the leading parts of each expert's matrix, unless it is an adapter, whose parts take next to nothing, and
    the isometries nearest to those of all experts together.
    """
    total = 0.0
    whole = sum(expert.kind != "adapter" for expert in plan.experts)
    for name in decomposed(plan):
        shape, rank = plan.base_header.tensors[name].shape, sum(ranks(plan, name))
        few, smaller = are_few(max(ranks(plan, name), default=0), shape), min(shape)
        total += whole * (LEADING_FLOPS if few else SVD_FLOPS) * math.prod(shape) * smaller
        if plan.orthogonal:
            isometry = ISOMETRY_FLOPS if min(rank, smaller) >= ISOMETRY_SIDE else SVD_FLOPS
            total += isometry * sum(side * rank * min(side, rank) for side in shape)
    return total
