"""Which matrices are merged through factors of their task vectors (`engine.task_vectors.factors`), and their sizes.

The factors of a matrix [m, n] take two products of 2·R·m·n FLOP a step, R ranks of all experts together, and no memory
traffic that grows with K. On a GPU they fit beside the weights. On a CPU, reading K dense task vectors is faster unless
K is large, since a core's products are slow compared with its memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.headers import BYTES
from engine.config.resources import Use
from engine.errors import ConfigError
from engine.planning.costs.rates import CORE_FLOPS, STREAM
from engine.planning.plan import ExpertPlan, Plan


def factored(plan: Plan, on_gpu: bool, use: Use) -> tuple[str, ...]:
    """Return the names of the matrices that the trainer merges through factors, in the order of `plan.merged`.

    Args:
        plan: The plan.
        on_gpu: Whether the trainer computes on a GPU.
        use: `cluster.factors` of the config. Matrices with coefficients of singular directions are always among them.
    """
    if not plan.config.learned:
        return ()
    along, have = directions(plan), [name for name in plan.merged if _has_factors(plan, name)]
    if use == "never":
        return tuple(along)
    return tuple(name for name in have if name in along or use == "always" or on_gpu or _faster(plan, name))


def directions(plan: Plan) -> dict[str, int]:
    """Return the matrices whose chunks of stage 2 are groups of singular directions, with the number of these.

    It is the largest number that an expert can have; those of the others are the first ones.
    """
    if not plan.config.spectral:
        return {}
    counts = {name: max(ranks(plan, name)) for name in plan.merged if _has_factors(plan, name)}
    return {name: count for name, count in counts.items() if count}


def check_directions(plan: Plan) -> None:
    """Check that chunks of singular directions are possible, if the config wants them.

    Raises:
        ConfigError: No merged tensor has singular directions, or factors must not be used.
    """
    if not plan.config.spectral:
        return
    chunks = f"`chunks: {plan.config.parameters.chunks}`"
    if plan.config.cluster.factors == "never":
        raise ConfigError(
            f"{chunks} merges matrices through factors, which `cluster.factors` forbids",
            "cluster.factors",
            "auto or always",
            "leave out `cluster.factors`, or set `chunks: contiguous`",
        )
    if directions(plan):
        return
    every = plan.config.parameters.task_vectors != "whole"
    raise ConfigError(
        f"{chunks} needs singular directions, and no merged tensor has such",
        "parameters.chunks",
        "matrices to merge" if every else "experts that are all adapters, as their task vectors are `whole`",
        "set `chunks: contiguous`" if every else "set `task_vectors: orthogonal` or `chunks: contiguous`",
    )


def decomposed(plan: Plan) -> tuple[str, ...]:
    """Return the names of the matrices whose task vectors are stored as singular parts, in the order of `plan.merged`.

    These are `plan.orthogonal`; of whole task vectors, which are adapters' then, those with chunks of directions.
    """
    return plan.orthogonal or tuple(directions(plan))


def ranks(plan: Plan, name: str) -> list[int]:
    """Return the rank of each expert's factors of a matrix. Of stored task vectors it may turn out to be smaller.

    An orthogonal part has at most rank ⌊min(m, n)/K⌋ (Gargiulo et al., arXiv 2412.00081).
    """
    own, most = [_own_rank(plan, expert, name) for expert in plan.experts], min(plan.base_header.tensors[name].shape)
    if name in plan.orthogonal_set:
        most = max(1, most // len(plan.experts))
    elif not plan.config.spectral:
        return own
    return [min(rank, most) for rank in own]


def factor_elements(plan: Plan, names: Iterable[str]) -> int:
    """Return the elements of the factors L [m, R] and V [R, n] of the named matrices."""
    return sum(sum(ranks(plan, name)) * sum(plan.base_header.tensors[name].shape) for name in names)


def factor_bytes(plan: Plan, names: Iterable[str]) -> int:
    """Return the bytes of the factors of the named matrices, as stored and on a GPU."""
    return factor_elements(plan, names) * BYTES[stored_dtype(plan)]


def stored_bytes(plan: Plan, names: Collection[str]) -> int:
    """Return the bytes of the stored task vectors, of which those of the named matrices are factors."""
    through, others = ([name for name in decomposed(plan) if (name in names) == wanted] for wanted in (True, False))
    whole = sum(plan.numels[name] * sum(rank > 0 for rank in ranks(plan, name)) for name in others)
    return factor_bytes(plan, through) + whole * BYTES[stored_dtype(plan)]


def factor_flops(plan: Plan, names: Iterable[str]) -> float:
    """Return the FLOP of one product with the factors of the named matrices: a merge, or a gradient."""
    return float(sum(2 * sum(ranks(plan, name)) * plan.numels[name] for name in names))


def stored_dtype(plan: Plan) -> str:
    """Return the dtype of stored task vectors and factors, as safetensors names it."""
    return "F32" if plan.dtype == "float32" else "BF16"


def _has_factors(plan: Plan, name: str) -> bool:
    """Return whether the matrix's task vectors are stored as factors, or are those of adapters alone."""
    if name in plan.orthogonal_set:
        return True
    return len(plan.base_header.tensors[name].shape) == 2 and all(
        expert.kind == "adapter" and isinstance(expert.header, AdapterHeader) and name not in expert.header.whole
        for expert in plan.experts
    )


def _faster(plan: Plan, name: str) -> bool:
    """Return whether a core multiplies the factors in half the time in which it reads dense task vectors.

    Half, since products lose more to other work on the cores than reading does (measured). Adapters have no dense task
    vectors: those take a multiple of the adapters' space. Compressed ones may be of any rank.
    """
    if all(isinstance(expert.header, AdapterHeader) and not expert.header.is_delta for expert in plan.experts):
        return True
    each = ranks(plan, name)
    reading = sum(rank > 0 for rank in each) * BYTES[stored_dtype(plan)] / STREAM
    return 2 * sum(each) / CORE_FLOPS < reading / 2


def _own_rank(plan: Plan, expert: ExpertPlan, name: str) -> int:
    """Return the rank that the expert's own task vector can have: that of an adapter's factors, or min(m, n)."""
    header, smaller = expert.header, min(plan.base_header.tensors[name].shape)
    if expert.kind == "adapter" and isinstance(header, AdapterHeader) and name not in header.whole:
        return header.tensors[header.pairs[name].a].shape[0] if name in header.pairs else 0
    return smaller
