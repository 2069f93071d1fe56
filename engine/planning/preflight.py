"""What a sample of the weights says against a learned merge, before any model runs.

Letters in array names: K experts, N sampled elements, I inputs of a matrix, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import FLOATS
from engine.checkpoints.ranges import Floats, Ranges
from engine.checkpoints.vocabulary import is_gathered
from engine.planning.differences import WARNING, left_out_lines
from engine.planning.plan import ExpertPlan, Plan

# The most tensors of which a range is read, and its elements.
TENSORS, RANGE = 64, 4096
# The cosine of two task vectors from which they count as equal, and that to which they count as opposed.
EQUAL, OPPOSED = 0.995, -0.5
# The cosine of an expert's weights and the base's below which it is no fine-tuned base. Random weights are near 0.
FOREIGN = 0.3
Array = npt.NDArray[np.float64]


def doubts(plan: Plan) -> list[str]:
    """Return lines on experts that equal the base or are no fine-tuned base, and on those equal or opposed to another.

    The task vectors are compared in matrices that every expert has under the base's name; of adapters, their products.
    """
    if not plan.config.learned or plan.layout is not None or plan.base.adapter is not None:
        return []
    names = [name for name in plan.merged if all(_is_there(plan, expert, name) for expert in plan.experts)]
    chosen = names[:: -(-len(names) // TENSORS) or 1]
    if not chosen:
        return []
    # Weights that are not finite make a cosine that is not, which is in no range; the merge refuses them.
    with np.errstate(over="ignore", invalid="ignore"):
        return list(_lines([expert.name for expert in plan.experts], *_sampled(plan, chosen)))


def remarks(plan: Plan, shares: Sequence[tuple[str, float]], found: Sequence[str]) -> Iterator[str]:
    """Yield what a user should know before the merge: about models and their weights, and options that are not used.

    Args:
        plan: The plan.
        shares: The result of `left_out`.
        found: The result of `doubts`.
    """
    for owner, note in plan.notes:
        yield f"{owner}: {note}"
    yield from (f"warning: {line}" for line in found)
    yield from left_out_lines(plan, [share for share in shares if share[1] > WARNING])
    if plan.config.unused:
        yield f"not used by {plan.config.merge_method}: {', '.join(plan.config.unused)}"


def _lines(names: Sequence[str], base_N: Array, change_KN: Array) -> Iterator[str]:
    cosine_KK = _cosines(change_KN, change_KN)
    similarity_K = _cosines(base_N[None] + change_KN, base_N[None])[:, 0]
    for k, name in enumerate(names):
        if not change_KN[k].any():
            yield f"{name} has the base's weights wherever a sample of its matrices was read: is it the right model?"
        if similarity_K[k] < FOREIGN:
            yield (
                f"{name} does not look fine-tuned from the base: the cosine of their weights is {similarity_K[k]:.2f}, "
                "near 1 if it were; check that it is of this base and not damaged, or leave it out"
            )
        # One line per expert and kind, however many are alike.
        for j in [j for j in range(k) if cosine_KK[k, j] >= EQUAL][:1]:
            yield (
                f"{names[j]} and {name} change the base in the same way (cosine {cosine_KK[k, j]:.3f}): leave one out, "
                "or their samples count twice"
            )
        for j in [j for j in range(k) if cosine_KK[k, j] <= OPPOSED][:1]:
            yield (
                f"{names[j]} and {name} change the base in opposite ways (cosine {cosine_KK[k, j]:.2f}): "
                "a sum keeps neither"
            )


def _cosines(first_KN: Array, second_JN: Array) -> Array:
    """Return the cosines of all pairs [K, J]; 0 where one of the two is 0."""
    size_K1, size_1J = np.linalg.norm(first_KN, axis=1)[:, None], np.linalg.norm(second_JN, axis=1)[None]
    size_KJ: Array = size_K1 * size_1J
    product_KJ: Array = first_KN @ second_JN.T
    # A product with 0 is 0, whatever divides it.
    return product_KJ / np.where(size_KJ == 0, 1.0, size_KJ)


def _sampled(plan: Plan, names: Sequence[str]) -> tuple[Array, Array]:
    """Return a sample of the base's weights [N], and of every expert's task vector at the same places [K, N]."""
    with Ranges(find_model(plan.base.model, ROOT), plan.base_header.tensors) as base:
        start_N = np.concatenate([base.read(name, *_middle(plan, name)) for name in names]).astype(np.float64)
    changes = []
    for expert in plan.experts:
        with Ranges(find_model(expert.model, ROOT), expert.header.tensors) as own:
            read_N = np.concatenate([_read(plan, expert, own, name) for name in names]).astype(np.float64)
        changes.append(read_N if isinstance(expert.header, AdapterHeader) else read_N - start_N)
    return start_N, np.stack(changes)


def _is_there(plan: Plan, expert: ExpertPlan, name: str) -> bool:
    """Return whether an expert has a whole float matrix for a tensor, or factors of one, with the base's rows."""
    tensor = plan.base_header.tensors[name]
    if len(tensor.shape) != 2 or 0 in tensor.shape or tensor.dtype not in FLOATS:
        return False
    if plan.vocabulary is not None and is_gathered(plan.base_header, name):
        return False  # their rows do not correspond
    if isinstance(expert.header, AdapterHeader):
        pair = expert.header.pairs.get(name)
        return pair is not None and not pair.transposed and name not in expert.header.whole
    source = expert.match.names(name)
    return bool(
        source
        and name not in expert.match.parts
        and expert.header.tensors[source[0]].shape == tensor.shape
        and expert.header.tensors[source[0]].dtype in FLOATS
    )


def _middle(plan: Plan, name: str) -> tuple[int, int]:
    """Return where the middle rows of a matrix begin and end in it, flattened: at most RANGE elements, or one row."""
    rows, columns = plan.base_header.tensors[name].shape
    count = max(1, min(rows, RANGE // columns))
    first = (rows - count) // 2
    return first * columns, (first + count) * columns


def _read(plan: Plan, expert: ExpertPlan, own: Ranges, name: str) -> Floats:
    """Return an expert's weights in the rows of `_middle`; of an adapter, its task vector there."""
    start, stop = _middle(plan, name)
    if not isinstance(expert.header, AdapterHeader):
        return own.read(expert.match.names(name)[0], start, stop)
    pair, tensors = expert.header.pairs[name], expert.header.tensors
    rank, columns = tensors[pair.a].shape[0], plan.base_header.tensors[name].shape[1]
    b_NR = own.read(pair.b, start // columns * rank, stop // columns * rank).reshape(-1, rank)
    a_RI = own.read(pair.a, 0, tensors[pair.a].numel).reshape(rank, -1)
    return np.asarray(pair.scaling * (b_NR @ a_RI), dtype=np.float32).ravel()
