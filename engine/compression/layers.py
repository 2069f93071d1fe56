"""One layer of experts made smaller: the method's groups, and its merged experts and router rows.

Letters: E experts, N groups, T tokens, H features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.compression.grouping import (
    Array,
    Groups,
    cosines,
    kmeans_groups,
    merging_weights,
    nearest_groups,
    pseudo_groups,
    ream_distances,
)
from engine.compression.merging import (
    GatedExpert,
    matching,
    subspace_mean,
    weight_distances,
    weight_products,
    weighted_mean,
)
from engine.compression.usage import LayerUse, Mixture, activation_distances
from engine.methods.compression import Compression

ReadExpert = Callable[[int], GatedExpert]


class ModuleMixture:
    """A layer of transformers with a router `gate` and fused `experts`, as a `Mixture`.

    Args:
        module: The layer.
        scores: How its router scores experts: `softmax` or `sigmoid`.
    """

    def __init__(self, module: Any, scores: str) -> None:
        self.module, self.count = module, len(module.gate.weight)
        self._score = torch.sigmoid if scores == "sigmoid" else lambda logits: logits.softmax(-1)
        self._device = module.gate.weight.device

    @torch.no_grad()
    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Mixture`."""
        logits_TE, weights_TK, chosen_TK = self.module.gate(x_TH.to(self._device))
        return logits_TE, self._score(logits_TE.float()), weights_TK, chosen_TK

    @torch.no_grad()
    def units(self, expert: int, x_TH: Tensor) -> Tensor:
        """See `Mixture`."""
        experts = self.module.experts
        gate_TI, up_TI = F.linear(x_TH.to(self._device), experts.gate_up_proj[expert]).chunk(2, dim=-1)
        found: Tensor = experts.act_fn(gate_TI) * up_TI
        return found

    @torch.no_grad()
    def output(self, expert: int, units_TI: Tensor) -> Tensor:
        """See `Mixture`."""
        return F.linear(units_TI, self.module.experts.down_proj[expert])


@dataclass(frozen=True)
class LayerGroups:
    """The groups of a layer, and the statistics that decided them.

    Attributes:
        groups: The experts that become one, the dominant one first.
        shares: The share of each of them.
        counts_E: See `LayerUse`.
        saliency_E: See `LayerUse`; zeros for a method that does not need it.
    """

    groups: Groups
    shares: tuple[tuple[float, ...], ...]
    counts_E: Array
    saliency_E: Array


def group_layer(
    mixture: Mixture, inputs: Sequence[Tensor], settings: Compression, kept: int, ranges: int = 1
) -> LayerGroups:
    """Return the groups of a layer.

    Args:
        mixture: The layer.
        inputs: Its inputs, [T, H], of each sample.
        settings: The method.
        kept: N.
        ranges: Equal ranges of experts of which a router first chooses some; experts of different ones are not merged.

    Raises:
        FloatingPointError: Logits or outputs of the experts are not finite.
    """
    use = LayerUse(mixture, inputs, outputs=settings.method != "m_smoe")
    if not use.is_finite:
        raise FloatingPointError
    usage_E = use.saliency_E if settings.method == "ream" else use.counts_E
    size, groups = mixture.count // ranges, list[tuple[int, ...]]()
    for start in range(0, mixture.count, size):
        own = slice(start, start + size)
        found = _groups(use, own, usage_E[own], settings, kept // ranges)
        groups += [tuple(start + expert for expert in group) for group in found]
    weights_E = use.weights_E if settings.method == "ream" else use.counts_E
    shares = tuple(tuple(merging_weights(weights_E, group)) for group in groups)
    return LayerGroups(tuple(groups), shares, use.counts_E, use.saliency_E)


def _groups(use: LayerUse, own: slice, usage_E: Array, settings: Compression, kept: int) -> Groups:
    """Return the groups of a range of experts."""
    logits_EE = use.logits_EE[own, own]
    if settings.method == "ream":
        distance_EE = ream_distances(use.outputs_EH[own], logits_EE)
        return pseudo_groups(distance_EE, usage_E, kept, settings.group_size)
    if settings.method == "m_smoe":
        return nearest_groups(cosines(logits_EE), usage_E, kept)
    return kmeans_groups(1 - use.alike_EE[own, own], usage_E, kept)


def merge_group(
    mixture: Mixture, inputs: Sequence[Tensor], settings: Compression, read: ReadExpert, group: Sequence[int],
    shares: Sequence[float],
) -> GatedExpert:  # fmt: skip
    """Return the experts of a group as one, float32.

    Args:
        mixture: The layer.
        inputs: Its inputs, [T, H], of each sample.
        settings: The method.
        read: Returns the weights of an expert.
        group: The experts, the dominant one first: its order of hidden units stays.
        shares: Their shares.
    """
    dominant, *others = (read(expert) for expert in group)
    aligned = [dominant]
    for expert, order_I in zip(others, _orders(mixture, inputs, settings, group, dominant, others), strict=True):
        aligned.append(expert if order_I is None else expert.in_order(order_I))
    if settings.method == "sub_moe":
        return subspace_mean(aligned, shares, settings.rank)
    return weighted_mean(aligned, shares)


def _orders(
    mixture: Mixture, inputs: Sequence[Tensor], settings: Compression, group: Sequence[int], dominant: GatedExpert,
    others: Sequence[GatedExpert],
) -> Iterator[Tensor | None]:  # fmt: skip
    """Yield the order of the hidden units of each other expert in which they fit the dominant one."""
    if settings.alignment == "none":
        yield from (None for _ in others)
    elif settings.alignment == "weights":
        yield from (matching(weight_products(dominant, other)) for other in others)
    else:
        for index, other in zip(group[1:], others, strict=True):
            distance_II = activation_distances(mixture, inputs, group[0], index)
            yield matching(distance_II + weight_distances(dominant, other))


def router_rows(stored: Tensor, found: LayerGroups, method: str) -> Tensor:
    """Return the rows of a router's tensor for the groups, in its dtype.

    They are those of the dominant experts; Sub-MoE takes the mean of a group's rows, by its shares.

    Source: REAM's published code, and the public reproduction of Sub-MoE that `subspace_mean` names. M-SMoE keeps all
    rows, as it keeps the experts that share weights; here the dominant one's stays.
    """
    if method != "sub_moe":
        return stored[[group[0] for group in found.groups]]
    rows = []
    for group, shares in zip(found.groups, found.shares, strict=True):
        row = stored[group[0]]
        if len(group) > 1:
            total = torch.zeros(row.shape)
            for expert, share in zip(group, shares, strict=True):
                total.add_(stored[expert].float(), alpha=share)
            row = total.to(stored.dtype)
        rows.append(row)
    return torch.stack(rows)


def as_tensors(found: LayerGroups) -> dict[str, Tensor]:
    """Return groups and statistics as tensors for a file."""
    label_E = np.empty(len(found.counts_E), dtype=np.int64)
    share_E = np.empty(len(found.counts_E))
    for index, (group, shares) in enumerate(zip(found.groups, found.shares, strict=True)):
        label_E[list(group)], share_E[list(group)] = index, shares
    return {
        "label": torch.from_numpy(label_E),
        "dominant": torch.tensor([group[0] for group in found.groups]),
        "share": torch.from_numpy(share_E),
        "count": torch.from_numpy(found.counts_E),
        "saliency": torch.from_numpy(found.saliency_E),
    }
