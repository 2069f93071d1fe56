"""WUDI: a merged task vector that interferes least with each expert's task vector, found by gradient descent.

Source: Cheng et al., Whoever Started the Interference Should End It, arXiv 2503.08099 (wudi); Wei et al., Unifying
Multimodal LLM Capabilities and Modalities via Model Merging, arXiv 2505.19892 (wudi2).
Formula: τ = argmin Σₖ ‖(τ − Tₖ)·Rₖᵀ‖²_F / ‖τₖ‖²_F, from Σₖ τₖ by `steps` steps of Adam; θ = θ₀ + λ·τ.
wudi: Tₖ = Rₖ = τₖ. wudi2: with the leading r = ⌊min(m, n)/K⌋ parts, Rₖ = Σₖ,ᵣ·Vₖ,ᵣᵀ of τₖ, and Tₖ = τ̄ + the leading
parts of τₖ − τ̄, τ̄ = (1/K)·Σₖ τₖ. These are the defaults of the published code for fully fine-tuned experts; for
adapters it uses `center: false`, `start: mean`, `optimizer: sgd` and a learning rate of 1e-4. Tensors that are not
matrices: θ₀ + (λ/K)·Σₖ τₖ.
Options: `steps` (300), `learning_rate` (1e-5), `lambda` (1.0); wudi2 also `center` (true), `start` (sum), `optimizer`
(adam).

The loss is quadratic in τ: its gradient is 2·(τ·A − B) with A = Σₖ RₖᵀRₖ/‖τₖ‖² and B = Σₖ Tₖ·RₖᵀRₖ/‖τₖ‖². Memory and
the cost of a step are therefore independent of the number of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.methods.options import LAMBDA, Footprint, Method, Option

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill


STEPS = Option("steps", 300, "gradient descent steps per tensor", kind=int, low=0)
LEARNING_RATE = Option("learning_rate", 1e-5, "learning rate of the optimiser", low=0)
CENTER = Option("center", True, "cut τₖ − τ̄ to its leading parts instead of τₖ", kind=bool)
START = Option(
    "start", "sum", "start of τ: the `sum` of the task vectors, or their `mean`", kind=str, choices=("sum", "mean")
)
OPTIMIZER = Option("optimizer", "adam", "`adam`, or `sgd` with momentum 0.9", kind=str, choices=("adam", "sgd"))

METHOD = Method(
    "wudi",
    "a merged task vector that interferes least with each expert's task vector",
    "Cheng et al., Whoever Started the Interference Should End It, arXiv 2503.08099",
    "θ = θ₀ + λ·argmin_τ Σₖ ‖(τ − τₖ)·τₖᵀ‖²_F / ‖τₖ‖²_F",
    (STEPS, LEARNING_RATE, LAMBDA),
    footprint=Footprint(),
)

SECOND = Method(
    "wudi2",
    "WUDI on the leading singular parts of the task vectors (WUDI v2)",
    "Wei et al., Unifying Multimodal LLM Capabilities and Modalities via Model Merging, arXiv 2505.19892",
    "θ = θ₀ + λ·argmin_τ Σₖ ‖(τ − Tₖ)·Rₖᵀ‖²_F / ‖τₖ‖²_F, Rₖ = Σₖ,ᵣ·Vₖ,ᵣᵀ",
    (STEPS, LEARNING_RATE, LAMBDA, CENTER, START, OPTIMIZER),
    footprint=Footprint(),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill` for wudi and wudi2, after `steps` optimiser steps."""
    import torch

    from engine.checkpoints.vocabulary import is_matrix
    from engine.methods.arithmetic.matrices import add_to_base, changed, mean_of_task_vectors

    if not is_matrix(tensor.shape, tensor.is_vocabulary):
        return mean_of_task_vectors(tensor)
    rows, columns = tensor.shape
    experts = len(tensor.task_vectors)
    total = torch.zeros(rows, columns)
    for tau in changed(tensor):
        total += tau
    mean = total / experts
    second = "start" in tensor.values
    rank = max(1, min(rows, columns) // experts)
    a, b = torch.zeros(columns, columns), torch.zeros(rows, columns)
    for tau in changed(tensor):
        norm = tau.square().sum()
        target = tau
        if second:
            _, s, vt = torch.linalg.svd(tau, full_matrices=False)
            gram = (vt[:rank].T * s[:rank].square()) @ vt[:rank] / norm
            center = mean if tensor.values["center"] else torch.zeros(())
            u, s, vt = torch.linalg.svd(tau - center, full_matrices=False)
            target = (u[:, :rank] * s[:rank]) @ vt[:rank] + center
        else:
            gram = tau.T @ tau / norm
        a += gram
        b.addmm_(target, gram)
    return add_to_base(tensor, _descend(tensor, mean if tensor.values.get("start") == "mean" else total, a, b))


def _descend(tensor: MergeTensor, start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return τ [m, n] after `steps` optimiser steps from `start`, with the gradient 2·(τ·A − B)."""
    import torch

    tau = torch.nn.Parameter(start.clone())
    learning_rate = float(tensor.values["learning_rate"])
    optimizer: torch.optim.Optimizer
    if tensor.values.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD([tau], lr=learning_rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam([tau], lr=learning_rate)
    for _ in range(int(tensor.values["steps"])):
        tau.grad = (tau.detach() @ a).sub_(b).mul_(2)
        optimizer.step()
    return tau.detach()
