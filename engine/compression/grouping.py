"""Which experts of a layer are merged with which: closed rules on statistics of the layer, float64 on the CPU.

Letters: E experts, N groups, F features. A group lists the experts that become one, its dominant expert first; groups
are in the order of their dominant experts, so that as many groups as experts change nothing. Equal values are decided
by the lower index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Groups = tuple[tuple[int, ...], ...]
# Bound of the iterations of K-means, which ends by itself after a few on so few points.
ITERATIONS = 100


def pseudo_groups(distance_EE: Array, saliency_E: Array, count: int, size: int) -> Groups:
    """Return REAM's groups: each dominant expert, the most salient first, takes the nearest experts that are left.

    A group has at most `size` experts. So the most salient ones absorb what is near to them, and most groups stay
    single, as in pruning.

    Source: REAM, arXiv 2604.04356; the order of the assignment from its published code.
    """
    centres = _first(saliency_E, count)
    members, left = {centre: [centre] for centre in centres}, set(range(len(saliency_E))) - set(centres)
    for centre in centres:
        near = [expert for expert in _ascending(distance_EE[centre]) if expert in left]
        members[centre] += near[: size - 1]
        left -= set(members[centre])
    assert not left, "the groups do not hold all experts"
    return _ordered(members.values())


def nearest_groups(similarity_EE: Array, usage_E: Array, count: int) -> Groups:
    """Return M-SMoE's groups: the most used experts are dominant, and each other expert joins the most similar one.

    The paper takes the most used experts of all layers, at least one a layer, and shares weights between experts that
    stay in the router. Here every layer keeps the same number, which a config.json needs.

    Source: M-SMoE, arXiv 2310.01334, section 3.2 (grouping).
    """
    centres = _first(usage_E, count)
    members = {centre: [centre] for centre in centres}
    ordered = sorted(centres)
    for expert in sorted(set(range(len(usage_E))) - set(centres)):
        members[ordered[int(np.argmax(similarity_EE[expert, ordered]))]].append(expert)
    return _ordered(members.values())


def kmeans_groups(points_EF: Array, usage_E: Array, count: int) -> Groups:
    """Return Sub-MoE's groups: clusters of K-means, whose dominant expert is the most used one.

    The first centre is the most used expert, each further one the expert that is farthest from all centres: unlike
    random starts, this gives the same clusters on every machine. A cluster that becomes empty takes the expert that is
    farthest from its own centre.

    Source: Sub-MoE, arXiv 2506.23266, adaptive expert clustering; the start is this engine's.
    """
    starts = [_first(usage_E, 1)[0]]
    while len(starts) < count:
        nearest_E = _squares(points_EF, points_EF[starts]).min(1)
        nearest_E[starts] = -1
        starts.append(int(np.argmax(nearest_E)))
    centres_NF, label_E = points_EF[starts], np.full(len(points_EF), -1)
    for _ in range(ITERATIONS):
        squares_EN = _squares(points_EF, centres_NF)
        new_E = squares_EN.argmin(1)
        for empty in sorted(set(range(count)) - set(new_E.tolist())):
            own_E = squares_EN[np.arange(len(new_E)), new_E]
            single_N = np.bincount(new_E, minlength=count) == 1
            own_E[single_N[new_E]] = -1
            new_E[int(np.argmax(own_E))] = empty
        if (new_E == label_E).all():
            break
        label_E = new_E
        centres_NF = np.stack([points_EF[label_E == group].mean(0) for group in range(count)])
    members = [np.flatnonzero(label_E == group).tolist() for group in range(count)]
    return _ordered([sorted(own, key=lambda expert: (-usage_E[expert], expert)) for own in members])


def ream_distances(outputs_EF: Array, logits_EE: Array) -> Array:
    """Return 1 − (s_out + s_gate)/2 of every pair of experts, [E, E].

    s_out = (1 + cos)/2 of the experts' mean gated outputs; s_gate = 1 − d/max d, d the distance between the unit
    vectors of two experts' router logits over all tokens.

    Args:
        outputs_EF: The mean over all tokens of the outputs times the router's scores.
        logits_EE: Σ z·zᵀ over all tokens, z [E] the router's logits.

    Source: REAM, arXiv 2604.04356, from its published code.
    """
    gate_EE = np.sqrt(np.maximum(0, 2 - 2 * cosines(logits_EE)))
    gate_EE = 1 - gate_EE / max(float(gate_EE.max()), np.finfo(np.float64).tiny)
    found: Array = 1 - ((1 + cosines(outputs_EF @ outputs_EF.T)) / 2 + gate_EE) / 2
    return found


def cosines(gram_EE: Array) -> Array:
    """Return the cosines of vectors from their inner products, [E, E]. Of a zero vector they are 0."""
    norm_E = np.sqrt(np.maximum(gram_EE.diagonal(), 0))
    inverse_E = np.divide(1, norm_E, out=np.zeros_like(norm_E), where=norm_E > 0)
    found: Array = np.clip(gram_EE * inverse_E * inverse_E[:, None], -1, 1)
    np.fill_diagonal(found, 1)
    return found


def merging_weights(usage_E: Array, group: Sequence[int]) -> list[float]:
    """Return the share of each expert of a group in the merged one; equal shares if none was used."""
    total = float(usage_E[list(group)].sum())
    return [float(usage_E[expert]) / total if total > 0 else 1 / len(group) for expert in group]


def _squares(points_EF: Array, centres_NF: Array) -> Array:
    found: Array = np.square(points_EF[:, None] - centres_NF[None]).sum(2)
    return found


def _first(values_E: Array, count: int) -> list[int]:
    """Return the indices of the largest values, in descending order."""
    return _ascending(-values_E)[:count]


def _ascending(values_E: Array) -> list[int]:
    return [int(index) for index in np.argsort(values_E, kind="stable")]


def _ordered(groups: Iterable[Sequence[int]]) -> Groups:
    """Return groups, each with its dominant expert first, in the order of these."""
    return tuple(sorted((tuple(group) for group in groups), key=lambda group: group[0]))
