"""The losses that pull a merged model towards its experts. Pure functions of tensors; float32 throughout.

Letters in tensor names: T tokens, H hidden features, V vocabulary. A sample has no padding, so every token counts.
Source: Expert Merging, arXiv 2509.25712.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Array = npt.NDArray[np.float64]


def hidden_loss(student: Mapping[int, Tensor], expert: Mapping[int, Tensor]) -> Tensor:
    """L_hid = mean over ℓ ∈ S of mean over tokens and features of (hₗ(x; θ) − hₖ,ₗ(x))²; 0 where S is empty.

    Both map a layer's index to [T, H] in any float dtype; the result is a float32 scalar.
    """
    if not expert:
        return torch.zeros(())
    return torch.stack([functional.mse_loss(student[i].float(), expert[i].float()) for i in sorted(expert)]).mean()


def logit_loss(student_TV: Tensor, expert_TV: Tensor, temperature: float) -> Tensor:
    """L_logit = T² · mean over tokens of KL(softmax(zₖ/T) ‖ softmax(z/T)), a float32 scalar.

    The same gradient as the soft-target cross entropy of the published code, and 0 at a perfect match.
    """
    student = functional.log_softmax(student_TV.float() / temperature, dim=-1)
    expert = functional.log_softmax(expert_TV.float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(student, expert, reduction="batchmean", log_target=True)


def regularization(alpha: Array, prior: Array) -> float:
    """R(α) = (1/C) · Σₖ Σ_c |αₖ,c − ᾱₖ| over learned coefficients [K, C]; 0 where none is learned."""
    return float(np.abs(alpha - prior).sum() / max(1, alpha.shape[1]))


def regularization_gradient(alpha: Array, prior: Array) -> Array:
    """∂R/∂α = sign(α − ᾱ) / C, [K, C]; 0 where α = ᾱ."""
    return np.asarray(np.sign(alpha - prior) / max(1, alpha.shape[1]))
