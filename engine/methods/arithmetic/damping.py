"""The damping of a merged task vector where the base's inputs are large, for the step `aim` after a merge."""

from __future__ import annotations

from torch import Tensor


def damp(tau_OI: Tensor, absolute_I: Tensor, omega: float) -> Tensor:
    """Return τ·diag(1 − s·(1 − ω)) [O, I], in the dtype of τ, with s = a/max(a) of the base's mean |x| of each input.

    Source: Nobari et al., Activation-Informed Merging of Large Language Models, arXiv 2502.02421. The input with the
    largest mean keeps ω of its change, one that is always zero keeps all of it. ω = 1 changes nothing.

    Args:
        tau_OI: The merged task vector of a linear layer.
        absolute_I: The mean of |x|, or its sum, of which the factor is of no matter. If it is zero, τ is returned.
        omega: ω, from 0 to 1.
    """
    largest = absolute_I.max()
    if not bool(largest > 0):
        return tau_OI
    return tau_OI * (1 - (1 - omega) * (absolute_I / largest)).to(tau_OI.dtype)
