"""RegMean++: RegMean block by block, on the hidden states of the model as it is merged so far.

Source: Nguyen et al., RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging,
arXiv 2508.03121, and its published code (github.com/nthehai01/RegMean-plusplus).
Formula: for block after block, Xₖ are the inputs of a linear layer of expert k's block on the hidden states that the
merged model has before the block, on expert k's samples; Cₖ = XₖXₖᵀ/Nₖ, C̃ₖ = α·Cₖ + (1 − α)·diag(Cₖ), and
W = (Σₖ Wₖ·C̃ₖ)·(Σₖ C̃ₖ)⁻¹. All other tensors, biases and norms among them: the mean of the experts.
Options: `alpha` (0.1).

This module computes the mean, and `engine.correction` solves the layers of blocks. In directions that no sample has,
W is the mean of the experts, where the published code inverts the sum of the Gram matrices.
"""

from __future__ import annotations

from engine.methods.options import Method
from engine.methods.regmean import ALPHA
from engine.methods.weight_average import prepare

__all__ = ["METHOD", "prepare"]

METHOD = Method(
    "regmean_plus_plus",
    "RegMean block by block, on the hidden states of the model merged so far (RegMean++)",
    "Nguyen et al., arXiv 2508.03121",
    "W = (Σₖ Wₖ·C̃ₖ)·(Σₖ C̃ₖ)⁻¹, C̃ₖ = α·XₖXₖᵀ/Nₖ + (1 − α)·diag(XₖXₖᵀ/Nₖ), Xₖ in the merged model",
    (ALPHA,),
    by_blocks=True,
)
