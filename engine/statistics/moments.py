"""Moments of the inputs of linear layers, and of gradients: what an expert's statistics hold of a tensor.

Letters: N tokens, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums over the tokens that a linear layer of an expert saw, of its inputs x [I].

    Attributes:
        tokens: N.
        square_I: Σ x², float32.
        absolute_I: Σ |x|, float32.
        gram_II: Σ x·xᵀ, float32; None if `inputs_NI` holds it, or if only the diagonal was collected.
        inputs_NI: The inputs themselves, float32, where N is below I and they take less than the Gram matrix.
    """

    tokens: int
    square_I: Tensor
    absolute_I: Tensor
    gram_II: Tensor | None = None
    inputs_NI: Tensor | None = None

    def gram(self) -> Tensor:
        """Return Σ x·xᵀ [I, I], float32. It must have been collected."""
        if self.gram_II is not None:
            return self.gram_II
        assert self.inputs_NI is not None
        return self.inputs_NI.T @ self.inputs_NI


class TensorStatistics(Protocol):
    """The statistics of one expert, or of the base, for one tensor."""

    @property
    def sequences(self) -> int:
        """The number of sequences from which the statistics were collected."""

    @property
    def tokens(self) -> int:
        """The number of inputs of the linear layer whose weight the tensor is; 0 if it is none. Nothing is read."""

    def moments(self) -> Moments | None:
        """Return the moments of the inputs, or None if the tensor is not the weight of a linear layer that saw any."""

    def fisher(self) -> Tensor | None:
        """Return the diagonal Fisher information, float32 in the tensor's shape, or None where it was not collected.

        It is the mean over sequences of the squared gradient of log p(y|x), with y sampled from the model.
        """

    def sensitivity(self, part: Literal["square", "median"]) -> Tensor | None:
        """Return what a sequence's sensitivity is, float32 in the tensor's shape, or None where it was not collected.

        The sensitivity g∘θ is the gradient of the sequence's mean loss per token times the weight. `square`: the mean
        of (g∘θ)² over S sequences. `median`: of each element the (⌊S/2⌋ + 1)-th smallest value of g∘θ, below or at
        which are those of more than half of the sequences.
        """
