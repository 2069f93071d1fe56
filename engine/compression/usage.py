"""What the experts of a layer do on samples: how often they are used, how much they add, and how alike they are.

Letters: E experts, T tokens, K experts of a token, H features, I hidden units of an expert. Sums over tokens are
float64, in the order of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.compression.grouping import Array
from engine.compression.merging import unit_distances

# Elements of the outputs of all experts that are in memory at a time.
NUMEL = 1 << 26


class Mixture(Protocol):
    """The experts of a layer and their router."""

    count: int

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits and scores of all experts, [T, E], and weights and indices of each token's experts, [T, K]."""

    def units(self, expert: int, x_TH: Tensor) -> Tensor:
        """Return the activations of an expert's hidden units, [T, I]."""

    def output(self, expert: int, units_TI: Tensor) -> Tensor:
        """Return the outputs of an expert from these, [T, H]."""


class LayerUse:
    """The statistics of a layer.

    Args:
        mixture: The layer.
        inputs: Its inputs, [T, H], of each sample.
        outputs: Whether every expert runs on every token; if not, what needs this is zero.

    Attributes:
        counts_E: The tokens that an expert is chosen for.
        saliency_E: The mean over these of w·‖f(x)‖, f(x) [H] the expert's output and w its weight in the layer's sum.
            Source: REAP, arXiv 2510.13999, equation 9; the published code of REAM multiplies by w twice.
        logits_EE: Σ z·zᵀ over all tokens, z [E] the router's logits.
        outputs_EH: The mean over all tokens of f(x) times the router's score.
        alike_EE: The mean over all tokens of the cosine of two experts' outputs.
    """

    def __init__(self, mixture: Mixture, inputs: Sequence[Tensor], outputs: bool) -> None:
        count, features = mixture.count, inputs[0].shape[1]
        self.counts_E: Array = np.zeros(count)
        self.logits_EE: Array = np.zeros((count, count))
        self.outputs_EH: Array = np.zeros((count, features))
        self.alike_EE: Array = np.zeros((count, count))
        self._added_E: Array = np.zeros(count)
        tokens = 0
        for sample_TH in inputs:
            for x_TH in torch.split(sample_TH, max(1, NUMEL // (count * features))):
                self._add(mixture, x_TH, outputs)
                tokens += len(x_TH)
        self.outputs_EH /= tokens
        self.alike_EE /= tokens
        self.saliency_E: Array = self._added_E / np.maximum(self.counts_E, 1)

    @property
    def is_finite(self) -> bool:
        """Whether all statistics are, and so the logits and outputs that they are of."""
        sums = self.saliency_E, self.logits_EE, self.outputs_EH, self.alike_EE
        return all(bool(np.isfinite(array).all()) for array in sums)

    @property
    def weights_E(self) -> Array:
        """The saliency, with that of the least salient used expert for experts that no token chose.

        Source: the published code of REAM, so that an unused expert can be merged.
        """
        used_E = self.saliency_E > 0
        least = float(self.saliency_E[used_E].min()) if used_E.any() else 1.0
        return np.where(used_E, self.saliency_E, least)

    def _add(self, mixture: Mixture, x_TH: Tensor, outputs: bool) -> None:
        logits_TE, scores_TE, weights_TK, chosen_TK = mixture.route(x_TH)
        self.counts_E += torch.bincount(chosen_TK.reshape(-1).cpu(), minlength=mixture.count).double().numpy()
        logits_TE = logits_TE.double().cpu()
        self.logits_EE += (logits_TE.T @ logits_TE).numpy()
        if not outputs:
            return
        directions_ETH = torch.empty(mixture.count, *x_TH.shape, device=x_TH.device)
        for expert in range(mixture.count):
            output_TH = mixture.output(expert, mixture.units(expert, x_TH)).float()
            norm_T = output_TH.norm(dim=1)
            weight_T = (weights_TK.float() * (chosen_TK == expert)).sum(1)
            self._added_E[expert] += float((weight_T * norm_T).double().sum())
            gated_TH = output_TH * scores_TE[:, expert, None].float()
            self.outputs_EH[expert] += gated_TH.double().sum(0).cpu().numpy()
            directions_ETH[expert] = F.normalize(output_TH, dim=1, eps=1e-30)
        directions_TEH = directions_ETH.transpose(0, 1)
        self.alike_EE += (directions_TEH @ directions_TEH.mT).double().sum(0).cpu().numpy()


def activation_distances(mixture: Mixture, inputs: Sequence[Tensor], ours: int, theirs: int) -> Tensor:
    """Return the distances between the unit vectors of two experts' activations over all tokens, [I, I].

    Args:
        mixture: The layer.
        inputs: Its inputs, [T, H], of each sample.
        ours: The expert whose order of hidden units stays.
        theirs: The expert that is matched with it.

    Source: REAM, arXiv 2604.04356, from its published code, which takes a sample of the tokens.
    """
    product, square, other = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for x_TH in inputs:
        ours_TI, theirs_TI = mixture.units(ours, x_TH).float(), mixture.units(theirs, x_TH).float()
        product = product + (ours_TI.T @ theirs_TI).cpu()
        square, other = square + ours_TI.square().sum(0).cpu(), other + theirs_TI.square().sum(0).cpu()
    return unit_distances(product, square, other)
