"""Losses of the learned methods, computed in float32.

All sums run in the order of `ordered_sum`. torch splits the sum of a whole tensor by the number of its threads, so that
the last bits of a loss, and with a relative one those of the gradients, would change with the number of CPUs.
Letters in tensor names: T tokens, H hidden features, V vocabulary. The tensors hold one sample without padding.
Sources: Expert Merging, arXiv 2509.25712; for the entropy AdaMerging, arXiv 2310.02575.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.task_vectors.coefficients import Array


def ordered_sum(values: Tensor) -> Tensor:
    """Return the sum over the first dimension, in an order that depends on its length alone: halves are added up.

    A sum of two tensors has the same bits whatever the threads and registers. Autograd may record it.
    """
    rest = values.new_zeros(values.shape[1:])
    while len(values) > 1:
        half = len(values) // 2
        if len(values) % 2:
            rest = rest + values[-1]
        values = values[:half] + values[half : 2 * half]
    return rest + values[0] if len(values) else rest


def hidden_loss(student: Mapping[int, Tensor], expert: Mapping[int, Tensor]) -> Tensor:
    """Return L_hid = mean over ℓ ∈ S of mean over tokens and features of (hₗ(x; θ) − hₖ,ₗ(x))²; 0 if S is empty.

    Both arguments map layer indices to [T, H] in any float dtype; S is the set of layers in `expert`. The result is a
    float32 scalar.
    """
    if not expert:
        return torch.zeros(())
    return _mean([_squares(student[i].float() - expert[i].float()) / expert[i].numel() for i in sorted(expert)])


def relative_hidden_loss(student: Mapping[int, Tensor], expert: Mapping[int, Tensor]) -> Tensor:
    """Return the hidden loss relative to the variance of the expert's hidden states.

    It is the mean over ℓ ∈ S of Σ (hₗ(x; θ) − hₖ,ₗ(x))² / Σ (hₖ,ₗ(x) − mean over tokens of hₖ,ₗ(x))²: 0 at a perfect
    match, 1 if the student's hidden states equal that mean, whatever the scale of the model's hidden states.

    Both arguments map layer indices to [T, H] in any float dtype; S is the set of layers in `expert`. The result is a
    float32 scalar, 0 if S is empty.
    """
    if not expert:
        return torch.zeros(())
    losses = []
    for i in sorted(expert):
        target_TH = expert[i].float()
        spread = _squares(target_TH - ordered_sum(target_TH) / len(target_TH))
        error = _squares(student[i].float() - target_TH)
        # A single token has no variance, so its error is relative to its own square.
        losses.append(error / torch.where(spread > 0, spread, _squares(target_TH).clamp_min(1e-12)))
    return _mean(losses)


def _squares(values: Tensor) -> Tensor:
    return ordered_sum(values.square().flatten())


def _mean(losses: list[Tensor]) -> Tensor:
    # Layers may be on different devices.
    return ordered_sum(torch.stack([loss.to(losses[-1].device) for loss in losses])) / len(losses)


def logit_loss(student_TV: Tensor, expert_TV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T² · Σ over tokens of KL(softmax(zₖ/T) ‖ softmax(z/T)), a float32 scalar, and its gradient in z [T, V].

    L_logit is this sum divided by the number of tokens; a sum allows for a long sample to be processed some tokens at a
    time. The gradient, T · (softmax(z/T) − softmax(zₖ/T)) in float32, equals that of the soft-target cross entropy of
    the published code; the value is 0 at a perfect match. The arguments (any float dtype) are not changed, and nothing
    is recorded for autograd.
    """
    student, expert = (
        functional.log_softmax(z.detach().float() / temperature, dim=-1) for z in (student_TV, expert_TV)
    )
    gap = expert - student
    probability = expert.exp_()
    kl = ordered_sum(gap.mul_(probability).flatten())
    gradient = student.exp_().sub_(probability).mul_(temperature)
    return temperature**2 * kl, gradient


def entropy_loss(student_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ over tokens of H(softmax(z)) = −Σᵢ pᵢ·ln pᵢ, a float32 scalar, and its gradient in z [T, V].

    AdaMerging's objective, which needs no expert, is this sum divided by the number of tokens. The gradient is
    ∂H/∂zᵢ = −pᵢ·(ln pᵢ + H) in float32. The argument (any float dtype) is not changed, and nothing is recorded for
    autograd.
    """
    p_TV = functional.softmax(student_TV.detach().float(), dim=-1)
    # −p·ln p, and 0 where p = 0.
    parts_TV = torch.special.entr(p_TV)
    entropy_T = ordered_sum(parts_TV.T)
    gradient = parts_TV.sub_(p_TV.mul_(entropy_T[:, None]))
    return ordered_sum(entropy_T), gradient


def regularization(alpha: Array, prior: Array) -> float:
    """Return R(α) = (1/C) · Σₖ Σ_c |αₖ,c − ᾱₖ| over the learned coefficients [K, C]; 0 if none is learned."""
    return float(np.abs(alpha - prior).sum() / max(1, alpha.shape[1]))


def regularization_gradient(alpha: Array, prior: Array) -> Array:
    """Return ∂R/∂α = sign(α − ᾱ) / C, [K, C]; 0 where α = ᾱ."""
    return np.asarray(np.sign(alpha - prior) / max(1, alpha.shape[1]))
