"""Calibration of the singular values of a merged task vector, after any merge (SVC).

Source: Li et al., When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, arXiv 2602.05536, whose γᵣ
FusionBench computes, too. The authors' code (github.com/lyymuwu/SVC) divides by max(α, mean of sᵣₖ over k) where all
sᵣₖ are positive, and leaves other directions as they are.
Letters: m rows and n columns, R singular parts, K experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.methods.arithmetic.matrices import leading

# A response of less than this part of an expert's task vector is one of rounding.
NONE = 1e-5


def spectral_calibration(tau: Tensor, task_vectors: Iterable[Tensor], alpha: float) -> Tensor:
    """Return Σᵣ γᵣ·σᵣ·uᵣ·vᵣᵀ [m, n], float32, of a merged task vector τ = Σᵣ σᵣ·uᵣ·vᵣᵀ.

    γᵣ = Kᵣ / Σₖ max(α, sᵣₖ), with the projection sᵣₖ = ⟨τᵀuᵣ, τₖᵀuᵣ⟩ / ‖τₖᵀuᵣ‖² of the merged response to the output
    direction uᵣ on that of expert k. Where experts share a direction, it was added up: sᵣₖ is above 1 and σᵣ shrinks.
    The sum is over the Kᵣ experts that respond to uᵣ: sᵣₖ of another one is undefined, and what rounding leaves of it
    has any size. Where none responds, σᵣ stays. Each expert is read once.

    Args:
        tau: τ [m, n], float32.
        task_vectors: τₖ [m, n], float32, of the K experts.
        alpha: α > 0. 1 only shrinks singular values; the paper's choice without data is 1/K.

    Raises:
        torch.linalg.LinAlgError: τ is not finite.
    """
    if not tau.any():
        return tau
    u_mR, s_R, vt_Rn = leading(tau, min(tau.shape))
    total_R, count_R = torch.zeros(2, len(s_R), dtype=torch.float64)
    for own in task_vectors:
        response_Rn = u_mR.T @ own
        # τᵀuᵣ = σᵣ·vᵣ
        along_R = torch.linalg.vecdot(vt_Rn, response_Rn).double() * s_R
        square_R = response_Rn.double().square().sum(dim=1)
        responds_R = square_R > (NONE * torch.linalg.vector_norm(own, dtype=torch.float64)) ** 2
        total_R += torch.where(responds_R, (along_R / square_R).clamp_min(alpha), 0)
        count_R += responds_R
    scaled_R = (s_R * torch.where(count_R > 0, count_R / total_R, 1)).float()
    calibrated: Tensor = (u_mR * scaled_R) @ vt_Rn
    return calibrated
