"""RCP-Merging: domain experts put into a reasoning model, but for elements that matter to its reasoning.

Source: RCP-Merging: Merging Long Chain-of-Thought Models with Domain-Specific Models by Considering Reasoning
Capability as Prior, arXiv 2508.03140, by its published code.
Formula: the first of `models` is the reasoning model r, each other one a domain expert d. With g_s the gradient of the
loss of sample s, F = mean_s (g_s∘θᵣ)² on the samples of r. Sample s of d votes for an element, +1, where
g_s∘θ_d + penalty·F∘(θᵣ − θ_d)² ≤ 0, else against it, −1. θ = θᵣ + Σ_d τ_d∘1[Σ_s votes > 0]. Elements without gradients
count as g = 0.
Options: `penalty` (1000), λ of the paper.

The votes are positive where more than half of g_s∘θ_d are at most −penalty·F∘(θᵣ − θ_d)², hence where their median is:
so d's statistics depend neither on r nor on the penalty. The paper has one domain expert; their sum is derived here.
The published code uses five samples of the domain, and the loss of all their tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import Footprint, Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

PENALTY = Option("penalty", 1000.0, "how much a change of what matters to reasoning counts against an element", low=0)

METHOD = Method(
    "rcp",
    "domain experts put into a reasoning model, the first of `models`, where that harms no reasoning (RCP-Merging)",
    "RCP-Merging, arXiv 2508.03140",
    "θ = θ₁ + Σ_d τ_d∘1[median_s(g_s∘θ_d) + penalty·F∘(θ₁ − θ_d)² ≤ 0], d > 1, F = mean_s (g_s∘θ₁)²",
    (PENALTY,),
    footprint=Footprint(),
    least=3,
    statistics=("sensitivity",),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`. It sums in one array of the tensor's size, one expert after the other.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element, or the statistics cannot be read.
    """
    import torch

    from engine.methods.arithmetic.matrices import add_to_base

    reasoning, *domains = tensor.statistics
    zeros = torch.zeros(())
    square = None if reasoning is None else reasoning.sensitivity("square")
    tau_r = tensor.task_vector(0)
    total = tau_r.clone()
    for d, of in enumerate(domains, start=1):
        tau, median = tensor.task_vector(d), None if of is None else of.sensitivity("median")
        harm = (tau_r - tau).square_().mul_(zeros if square is None else square)
        score = harm.mul_(float(tensor.values["penalty"])).add_(zeros if median is None else median)
        total += torch.where(score <= 0, tau, 0)
    return add_to_base(tensor, total)
