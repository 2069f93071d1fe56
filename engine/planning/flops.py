"""How much there is to compute and to keep: FLOP of a sample, of orthogonal task vectors, and a token's activations.

From config and file headers alone, for the scaling model. Knows neither torch nor Ray.
"""

from __future__ import annotations

import math
from typing import Any

from engine.planning.plan import Plan
from engine.sizes import MATRICES_PER_CALL

# Of a singular value decomposition with its vectors, an element and singular value: LAPACK's, measured on one core.
SVD_FLOPS = 21


# Matrices of the same size that one holds at its height, its own and its results among them; measured.
SVD_COPIES = 8


def sample_flops(plan: Plan, tokens: float) -> tuple[float, float]:
    """FLOP of one sample forward and backward, targets' logits included; a gradient of weights only where merged."""
    header, config = plan.base_header, plan.base_header.text_config
    hidden, layers = int(config.get("hidden_size") or 0), header.num_layers or 0
    # What only looks rows up, or adds and scales, multiplies nothing to speak of; the head does, tied or not.
    share = _share(config)
    every = {name: tensor.numel for name, tensor in header.tensors.items() if len(tensor.shape) in (2, 3)}
    seen = {name: numel * share if ".experts." in name else numel for name, numel in every.items()}
    body = sum(numel for name, numel in seen.items() if "embed" not in name and "head" not in name)
    merged = sum(seen[name] for name in plan.merged if name in seen)
    head, attention = hidden * (header.vocab_size or 0), 2 * layers * hidden * tokens
    forward = tokens * (2 * body + 4 * head + 2 * attention)
    return forward, tokens * (2 * body + 2 * merged + 2 * head + 4 * attention)


def orthogonal_bytes(plan: Plan, cpus: float) -> float:
    """What a shard needs meanwhile: at each core a decomposition, and the parts of all that it was asked for."""
    largest = max((plan.numels[name] for name in plan.orthogonal), default=0)
    experts = len(plan.experts)
    return 4 * largest * (SVD_COPIES * min(cpus, MATRICES_PER_CALL * experts) + 2 * MATRICES_PER_CALL)


def _share(config: dict[str, Any]) -> float:
    """The part of a mixture's experts that a token goes through."""
    count, chosen = config.get("num_experts", config.get("num_local_experts")), config.get("num_experts_per_tok")
    return chosen / count if type(chosen) is int and type(count) is int and count else 1.0


def kept_elements(plan: Plan) -> float:
    """Elements a token that a Llama-like model keeps for its backward pass; a block's alone with checkpointing."""
    config = plan.base_header.text_config
    hidden, layers = int(config.get("hidden_size") or 0), plan.base_header.num_layers or 0
    inner = int(config.get("intermediate_size") or 4 * hidden)
    block = 12 * hidden + 5 * inner
    return layers * hidden + block if plan.config.gradient_checkpointing else layers * block


def orthogonal_flops(plan: Plan) -> float:
    """FLOP of making task vectors orthogonal: a singular value decomposition an expert and matrix, and two of all."""
    shapes = [plan.base_header.tensors[name].shape for name in plan.orthogonal]
    each = float(sum(math.prod(shape) * min(shape) for shape in shapes))
    return SVD_FLOPS * (len(plan.experts) + 2) * each
