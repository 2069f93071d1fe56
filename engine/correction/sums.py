"""What an expert adds to the equations of layers, and their solution.

Letters: N tokens, I input features, O output features, D features of a norm. S are inputs that the merged model gives a
layer, T inputs of the expert's. An expert's share in the equations of several linear layers with one input:

    gram [I, I] = c·Cₖ,  Cₖ = S·Sᵀ/N;   numerator [O, I] = c·Wₖ·(T·Sᵀ/N);   scale = c
    mean [I] = c·x̄_S;   target [O] = c·(bₖ + Wₖ·x̄_T)

and in those of a norm of z, its input without weight γ and bias β: energy E = mean z², mean m = mean z, E·γₖ + m·βₖ,
m·γₖ + βₖ, and 1 for the number of experts. The shares of all experts are added in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.correction.rules import Rule
from engine.methods.arithmetic.regression import solve

# The least norm of a Gram matrix, by which it is divided.
LEAST_NORM = 1e-8
# Of a norm's 2 x 2 system: a determinant below this share of the product of its diagonal is zero by rounding.
SINGULAR = 1e-6


@dataclass(frozen=True)
class Affine:
    """Weight and bias of a layer, float32. The weight is [O, I] in a linear layer, [D] in a norm; None: no bias."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass
class InputSums:
    """Sums of the inputs that some linear layers share, in float32 and in the order of the samples."""

    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, s: Tensor, e: Tensor | None, rule: Rule) -> None:
        """Add the inputs [..., I] of a sample in the merged model and, if the rule has its stream, in the expert."""
        s_NI = s.reshape(-1, s.shape[-1]).float()
        self.tokens += len(s_NI)
        self._add("ss", s_NI.T @ s_NI)
        self._add("s", s_NI.sum(0))
        if e is not None:
            t_NI = e.reshape(s_NI.shape).float() * rule.alpha + s_NI * (1 - rule.alpha)
            self._add("ts", t_NI.T @ s_NI)
            self._add("t", t_NI.sum(0))

    def share(self, layers: Mapping[str, Affine], rule: Rule) -> dict[str, Tensor]:
        """Return the expert's share in the equations of its layers, by name: tensors to be stored, and to be added."""
        gram_II, mean_I = self.sums["ss"] / self.tokens, self.sums["s"] / self.tokens
        cross_II, expected_I = (
            (self.sums["ts"] / self.tokens, self.sums["t"] / self.tokens) if "ts" in self.sums else (gram_II, mean_I)
        )
        if rule.off_diagonal != 1:
            gram_II = gram_II * rule.off_diagonal + torch.diag(gram_II.diagonal() * (1 - rule.off_diagonal))
            cross_II = gram_II
        scale = 1 / gram_II.norm().clamp_min(LEAST_NORM) if rule.normalised else gram_II.new_ones(())
        found = {"gram": gram_II * scale, "mean": mean_I * scale, "scale": scale}
        for name, layer in layers.items():
            found[f"numerator.{name}"] = layer.weight @ (cross_II * scale)
            if layer.bias is not None:
                found[f"target.{name}"] = (layer.bias + layer.weight @ expected_I) * scale
        return found

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name].add_(value) if name in self.sums else value


@dataclass
class NormSums:
    """Sums of the inputs z of a norm, without its weight and bias, in float32 and in the order of the samples."""

    tokens: int = 0
    energy_D: Tensor | None = None
    total_D: Tensor | None = None

    def add(self, z: Tensor) -> None:
        """Add the normalised input [..., D] of a sample."""
        z_ND = z.reshape(-1, z.shape[-1]).float()
        self.tokens += len(z_ND)
        energy_D, total_D = z_ND.square().sum(0), z_ND.sum(0)
        self.energy_D = energy_D if self.energy_D is None else self.energy_D.add_(energy_D)
        self.total_D = total_D if self.total_D is None else self.total_D.add_(total_D)

    def share(self, norm: Affine) -> dict[str, Tensor]:
        """Return the expert's share in the equations of its norm."""
        assert self.energy_D is not None and self.total_D is not None
        energy_D, mean_D = self.energy_D / self.tokens, self.total_D / self.tokens
        if norm.bias is None:
            return {"energy": energy_D, "weight": energy_D * norm.weight}
        return {
            "energy": energy_D,
            "mean": mean_D,
            "weight": energy_D * norm.weight + mean_D * norm.bias,
            "bias": mean_D * norm.weight + norm.bias,
            "count": torch.ones(()),
        }


def added(shares: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of the experts' shares, in their order. One share is in memory at a time."""
    total: dict[str, Tensor] = {}
    for share in shares:
        for name, tensor in share.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total


def anchor_of(merged: Affine, base: Affine, rule: Rule) -> Affine:
    """Return ρ·merged + (1 − ρ)·base."""

    def between(one: Tensor, zero: Tensor) -> Tensor:
        return one * rule.rho + zero * (1 - rule.rho)

    bias = between(merged.bias, base.bias) if merged.bias is not None and base.bias is not None else None
    return Affine(between(merged.weight, base.weight), bias)


def solve_linear(total: Mapping[str, Tensor], anchors: Mapping[str, Affine], rule: Rule) -> dict[str, Affine]:
    """Return the solved layers that share an input, by name, from the sum of all experts' shares.

    `anchors` are the layers to solve, in an order, with A and the anchor of the bias. A bias that is not solved has no
    target or no anchor, and is None.
    """
    stacked_OI = torch.cat([total[f"numerator.{name}"] for name in anchors])
    anchor_OI = torch.cat([anchor.weight for anchor in anchors.values()])
    solved_OI = solve(stacked_OI, total["gram"], rule.ridge, anchor_OI)
    weights = torch.split(solved_OI, [len(anchor.weight) for anchor in anchors.values()])
    found = {}
    for (name, anchor), weight_OI in zip(anchors.items(), weights, strict=True):
        target_O = total.get(f"target.{name}") if rule.with_norms else None
        bias_O = None
        if target_O is not None and anchor.bias is not None:
            numerator_O = target_O - weight_OI @ total["mean"] + anchor.bias * rule.ridge
            bias_O = numerator_O / (total["scale"] + rule.ridge)
        found[name] = Affine(weight_OI, bias_O)
    return found


def solve_norm(total: Mapping[str, Tensor], anchor: Affine, rule: Rule) -> Affine:
    """Return the solved norm from the sum of all experts' shares; where its inputs decide nothing, the anchor's."""
    a_D, weight_D = total["energy"].double() + rule.ridge, total["weight"].double() + anchor.weight * rule.ridge
    if "mean" not in total or anchor.bias is None:
        return Affine(torch.where(a_D > 0, weight_D / a_D, anchor.weight).float())
    b_D, c = total["mean"].double(), total["count"].double() + rule.ridge
    bias_D = total["bias"].double() + anchor.bias * rule.ridge
    determinant_D = a_D * c - b_D.square()
    regular_D = determinant_D > SINGULAR * a_D * c
    return Affine(
        torch.where(regular_D, (c * weight_D - b_D * bias_D) / determinant_D, anchor.weight).float(),
        torch.where(regular_D, (a_D * bias_D - b_D * weight_D) / determinant_D, anchor.bias).float(),
    )
