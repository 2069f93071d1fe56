"""WIDEN: task vectors weighted per input feature by how far its magnitude and its direction moved.

Source: Yu et al., Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement,
arXiv 2408.03092.
Formula: for column j of a matrix, mₖⱼ = ‖θₖ[:, j]‖ and vₖⱼ = θₖ[:, j]/mₖⱼ; Δᵐₖⱼ = |mₖⱼ − m₀ⱼ|, Δᵈₖⱼ = 1 − ⟨vₖⱼ, v₀ⱼ⟩.
Of each, rₖⱼ is the rank of Δₖⱼ among the n columns of expert k, divided by n, and sₖⱼ = softmax over k of rₖⱼ; where
rₖⱼ > `ratio`·mean(rₖ), sₖⱼ = `calibration`. θ = θ₀ + λ·Σₖ τₖ·diag((sᵐₖ + sᵈₖ)/2). A matrix with one row per token,
embedding or head, has the tokens as its columns. For tensors that are not matrices, Δ = |τₖ| per element, and s is used
alone.
Options: `ratio` (1.0), `calibration` (1.0), `lambda` (1.0).

It was made for models that were fine-tuned and models whose pre-training went on: weights then differ by orders of
magnitude, while ranks do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

RATIO = Option("ratio", 1.0, "a feature above this multiple of the expert's mean rank counts as important", low=0)
CALIBRATION = Option("calibration", 1.0, "the weight of important features", low=0)

METHOD = Method(
    "widen",
    "task vectors weighted per input feature by how far its magnitude and direction moved (WIDEN)",
    "Yu et al., arXiv 2408.03092",
    "θ = θ₀ + λ·Σₖ τₖ·diag((sᵐₖ + sᵈₖ)/2), s from the ranks of the changes",
    (RATIO, CALIBRATION, LAMBDA),
    footprint=Footprint(),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`. Each expert is read twice: for the changes [K, n] of its features, and for the sum.

    Raises:
        CheckpointError: τₖ has a NaN or infinite element.
    """
    import torch

    from engine.methods.arithmetic.matrices import add_to_base

    experts = range(len(tensor.task_vectors))
    if len(tensor.shape) == 2:
        base = tensor.base.float()
        # The dimension over which a column's norm is taken.
        along = 1 if tensor.is_vocabulary else 0
        both = [_changes(base, tensor.task_vector(k), along) for k in experts]
        magnitude, direction = (_weights(tensor, torch.stack(each)) for each in zip(*both, strict=True))
        weights = ((magnitude + direction) / 2).unsqueeze(1 + along)
    else:
        weights = _weights(tensor, torch.stack([tensor.task_vector(k).abs().reshape(-1) for k in experts]))
        weights = weights.view(len(experts), *tensor.shape)
    total = torch.zeros(tensor.shape)
    for k in experts:
        total.addcmul_(tensor.task_vector(k), weights[k])
    return add_to_base(tensor, total)


def _changes(base: Tensor, tau: Tensor, along: int) -> tuple[Tensor, Tensor]:
    """Return Δᵐ and Δᵈ of all columns [n]. A column of zeros has no direction, and none that moved."""
    import torch

    model = base + tau
    before, after = base.norm(dim=along), model.norm(dim=along)
    cosine = torch.linalg.vecdot(base, model, dim=along) / (before * after).clamp_min(torch.finfo(torch.float32).tiny)
    moved = torch.where((before > 0) & (after > 0), 1 - cosine, 0)
    return (after - before).abs(), moved


def _weights(tensor: MergeTensor, changes: Tensor) -> Tensor:
    """Return s [K, n] of changes Δ [K, n]."""
    import torch

    count = changes.shape[1]
    # The place of each column in the sorted order, from 1; of equal changes, the first column has the lower one.
    places = torch.empty(changes.shape, dtype=torch.int64)
    places.scatter_(1, changes.argsort(dim=1, stable=True), torch.arange(1, count + 1).expand_as(places))
    # Places, whose mean is (n + 1)/2, are compared instead of ranks: rounding must not decide about the middle one.
    important = places > float(tensor.values["ratio"]) * (count + 1) / 2
    return torch.where(important, float(tensor.values["calibration"]), (places / count).softmax(dim=0))
