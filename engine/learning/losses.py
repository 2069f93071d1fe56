"""The losses that coefficients are learned by. Pure functions of tensors; float32 throughout.

Letters in tensor names: T tokens, H hidden features, V vocabulary. A sample has no padding, so every token counts.
Sources: Expert Merging, arXiv 2509.25712; of the entropy AdaMerging, arXiv 2310.02575.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.task_vectors.coefficients import Array


def hidden_loss(student: Mapping[int, Tensor], expert: Mapping[int, Tensor]) -> Tensor:
    """L_hid = mean over ℓ ∈ S of mean over tokens and features of (hₗ(x; θ) − hₖ,ₗ(x))²; 0 where S is empty.

    Both map a layer's index to [T, H] in any float dtype; the result is a float32 scalar.
    """
    if not expert:
        return torch.zeros(())
    losses = [functional.mse_loss(student[i].float(), expert[i].float()) for i in sorted(expert)]
    # Layers may be on several devices.
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()


def relative_hidden_loss(student: Mapping[int, Tensor], expert: Mapping[int, Tensor]) -> Tensor:
    """The hidden loss in units of the expert's own variance: mean over ℓ ∈ S of Σ (hₗ(x; θ) − hₖ,ₗ(x))² over the sum of
    squares of hₖ,ₗ(x) around its mean over tokens.

    0 at a perfect match, 1 where the merged model says no more than that mean, whatever the size of a model's hidden
    states. Both map a layer's index to [T, H] in any float dtype; the result is a float32 scalar.
    """
    if not expert:
        return torch.zeros(())
    losses = []
    for i in sorted(expert):
        target_TH = expert[i].float()
        spread = (target_TH - target_TH.mean(dim=0)).square().sum()
        error = (student[i].float() - target_TH).square().sum()
        # One token alone has no spread: its error counts by its own size.
        losses.append(error / (spread if spread > 0 else target_TH.square().sum().clamp_min(1e-12)))
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()


def logit_loss(student_TV: Tensor, expert_TV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T² · Σ over tokens of KL(softmax(zₖ/T) ‖ softmax(z/T)), a float32 scalar, and its gradient by z [T, V].

    Divided by the number of tokens it is L_logit: a sum, so that a long sample can be taken some tokens at a time. The
    gradient, T · (softmax(z/T) − softmax(zₖ/T)) in float32, is that of the published code's soft-target cross entropy;
    the value is 0 at a perfect match. Neither operand is kept or changed; nothing is recorded for autograd.
    """
    student, expert = (
        functional.log_softmax(z.detach().float() / temperature, dim=-1) for z in (student_TV, expert_TV)
    )
    gap = expert - student
    probability = expert.exp_()
    kl = torch.dot(probability.reshape(-1), gap.reshape(-1))
    gradient = student.exp_().sub_(probability).mul_(temperature)
    return temperature**2 * kl, gradient


def entropy_loss(student_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over tokens of H(softmax(z)) = −Σᵢ pᵢ·ln pᵢ, a float32 scalar, and its gradient by z [T, V].

    Divided by the number of tokens it is AdaMerging's objective, for which no expert is asked. The gradient is
    ∂H/∂zᵢ = −pᵢ·(ln pᵢ + H) in float32. The operand is not kept or changed; nothing is recorded for autograd.
    """
    p_TV = functional.softmax(student_TV.detach().float(), dim=-1)
    # −p·ln p, and 0 where p is.
    parts_TV = torch.special.entr(p_TV)
    entropy_T = parts_TV.sum(dim=-1)
    gradient = parts_TV.sub_(p_TV.mul_(entropy_T[:, None]))
    return entropy_T.sum(), gradient


def regularization(alpha: Array, prior: Array) -> float:
    """R(α) = (1/C) · Σₖ Σ_c |αₖ,c − ᾱₖ| over learned coefficients [K, C]; 0 where none is learned."""
    return float(np.abs(alpha - prior).sum() / max(1, alpha.shape[1]))


def regularization_gradient(alpha: Array, prior: Array) -> Array:
    """∂R/∂α = sign(α − ᾱ) / C, [K, C]; 0 where α = ᾱ."""
    return np.asarray(np.sign(alpha - prior) / max(1, alpha.shape[1]))
