"""The experts of a group as one: their hidden units are put into one order, and their weights averaged.

Letters: I hidden units of an expert, H features, T tokens. An expert is down·(act(gate·x)∘(up·x)). Its hidden units may
stand in any order without a change of its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class GatedExpert:
    """The weights of an expert: gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def units(self) -> Tensor:
        """What makes each hidden unit, float32: its rows of gate and up, and its column of down, [I, 3·H]."""
        return torch.cat([self.gate.float(), self.up.float(), self.down.float().T], 1)

    def in_order(self, order_I: Tensor) -> GatedExpert:
        """Return the same expert with its hidden units in another order."""
        return GatedExpert(self.gate[order_I], self.up[order_I], self.down[:, order_I])


def unit_distances(products_II: Tensor, ours_I: Tensor, theirs_I: Tensor) -> Tensor:
    """Return the distances between unit vectors, ‖a/‖a‖ − b/‖b‖‖, [I, I].

    Args:
        products_II: The inner products ⟨a, b⟩.
        ours_I: The squared norms ‖a‖².
        theirs_I: The squared norms ‖b‖². A zero vector has the distance 1 from a unit vector, and 0 from a zero one.
    """
    ours_I, theirs_I = ours_I.double().clamp_min(0).sqrt(), theirs_I.double().clamp_min(0).sqrt()
    scale_II = ours_I[:, None] * theirs_I
    product_II = torch.where(scale_II > 0, products_II.double() / scale_II.clamp_min(1e-300), 0)
    return ((ours_I > 0).double()[:, None] + (theirs_I > 0) - 2 * product_II).clamp_min(0).sqrt()


def weight_distances(ours: GatedExpert, theirs: GatedExpert) -> Tensor:
    """Return the distances between the unit vectors of two experts' hidden units, from their weights, [I, I].

    Source: REAM, arXiv 2604.04356, which projects the units to 64 principal components first; here they are whole.
    """
    ours_IF, theirs_IF = ours.units, theirs.units
    return unit_distances(ours_IF @ theirs_IF.T, ours_IF.square().sum(1), theirs_IF.square().sum(1))


def weight_products(ours: GatedExpert, theirs: GatedExpert) -> Tensor:
    """Return −⟨a, b⟩ of two experts' hidden units, [I, I].

    The order with the least sum is that with the least ‖a − b‖² of all weights.

    Source: M-SMoE, arXiv 2310.01334, section 3.2 (alignment by weight matching), for gated experts.
    """
    return -(ours.units @ theirs.units.T).double()


def matching(cost_II: Tensor) -> Tensor:
    """Return the order of their hidden units, [I], in which unit i of ours costs least to be matched with it.

    An exact solution of the assignment problem, in O(I³).

    Raises:
        FloatingPointError: A cost is not finite.
    """
    if not bool(cost_II.isfinite().all()):
        raise FloatingPointError
    return torch.from_numpy(linear_sum_assignment(cost_II.cpu().numpy())[1])


def weighted_mean(experts: Sequence[GatedExpert], shares: Sequence[float]) -> GatedExpert:
    """Return Σ shareₘ·θₘ, float32, added in order. The shares add up to 1."""

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(tensors[0].shape)
        for tensor, share in zip(tensors, shares, strict=True):
            total.add_(tensor.float().cpu(), alpha=share)
        return total

    return GatedExpert(*(mean([getattr(one, name) for one in experts]) for name in ("gate", "up", "down")))


def subspace_mean(experts: Sequence[GatedExpert], shares: Sequence[float], rank: float) -> GatedExpert:
    """Return U·Σ·(Σₘ shareₘ·Vₘ)ᵀ of each projection, float32, from U·Σ·[V₁ᵀ … Vₘᵀ] = [W₁ … Wₘ].

    With all singular directions this is the mean of the weights, as U·Σ·Vₘᵀ = Wₘ.

    Args:
        experts: The experts of the group.
        shares: Their shares in their usage, which add up to 1.
        rank: The share of the singular directions that are kept, at least one.

    Source: Sub-MoE, arXiv 2506.23266: its abstract, and a public reproduction that names its equations 5 to 7; its own
    code could not be read.
    """
    if rank == 1:
        return weighted_mean(experts, shares)

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        union = torch.cat([tensor.float().cpu() for tensor in tensors], 1)
        left, values, right = torch.linalg.svd(union, full_matrices=False)
        kept = max(1, round(rank * len(values)))
        parts = torch.split(right[:kept], tensors[0].shape[1], dim=1)
        merged = torch.zeros(parts[0].shape)
        for part, share in zip(parts, shares, strict=True):
            merged.add_(part, alpha=share)
        rebuilt: Tensor = (left[:, :kept] * values[:kept]) @ merged
        return rebuilt

    return GatedExpert(*(mean([getattr(one, name) for one in experts]) for name in ("gate", "up", "down")))
