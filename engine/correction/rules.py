"""What the methods that run block by block have in common, and in what they differ.

Each solves, for every linear layer of a block, Σₖ cₖ·‖W·Sₖ − Wₖ·Tₖ‖²_F + λ·‖W − A‖²_F, with inputs Sₖ that the merged
model gives the layer on expert k's samples, and inputs Tₖ of expert k's layer.

featcal. Source: FeatCal, arXiv 2605.13030, and its published code (github.com/egangu/featcal). Inputs of the merged
model are those of its own block, as it was before the block is solved; Tₖ = α·Eₖ + (1 − α)·Sₖ with the inputs Eₖ in the
expert; cₖ = 1/‖Cₖ‖_F, Cₖ = Sₖ·Sₖᵀ/Nₖ. All layers of a block are solved from one pass, as in the code, and not one after
another. A = ρ·W_merged + (1 − ρ)·W₀. Biases and norms are solved, too; the code has LayerNorm, and RMSNorm is its case
without a bias. The code's last vision layer weighs its tokens for CLIP's pooling, which is left out here.
regmean_plus_plus. Source: RegMean++, arXiv 2508.03121, and its published code (github.com/nthehai01/RegMean-plusplus).
The expert's block runs on the merged model's hidden states, Tₖ = Sₖ are the inputs of its layers, cₖ = 1/Nₖ, and the
elements off the diagonals of Sₖ·Sₖᵀ count by a factor. λ = 0; all else is the mean of the experts. The code inverts the
sum of the Gram matrices; here directions that no sample has keep the mean of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.methods.corrections import CORRECTIONS
from engine.methods.registry import get_method
from engine.planning.plan import Plan
from engine.shards.settings import resolve


@dataclass(frozen=True)
class Rule:
    """How the layers of a block are solved.

    Attributes:
        alpha: α, the share of the expert's inputs in Tₖ.
        rho: ρ of the anchor.
        ridge: λ.
        off_diagonal: Factor of the elements off the diagonal of a Gram matrix.
        own_blocks: Whether the expert's block, not the merged one, gives the inputs Sₖ.
        normalised: Whether cₖ = 1/‖Cₖ‖_F; else 1/Nₖ.
        with_norms: Whether biases and norms are solved, too.
    """

    alpha: float = 0.0
    rho: float = 1.0
    ridge: float = 0.0
    off_diagonal: float = 1.0
    own_blocks: bool = False
    normalised: bool = True
    with_norms: bool = True

    @property
    def has_expert_stream(self) -> bool:
        """Whether the hidden states of the expert itself are needed."""
        return self.alpha > 0


def rule_of(plan: Plan) -> Rule | None:
    """Return the rule by which the layers of a merge are solved, or None if none are.

    Raises:
        ConfigError: an option differs between tensors.
    """
    config = plan.config
    if get_method(config.merge_method).by_blocks:
        values = {float(resolve(plan, name)[0]["alpha"]) for name in plan.merged}
        if len(values) != 1:
            raise ConfigError("its value differs between tensors", "parameters.alpha", "one value for the whole model")
        return regmean_plus_plus(values.pop())
    return next((featcal(one.options) for one in config.calibrate if CORRECTIONS[one.method].by_blocks), None)


def featcal(options: Mapping[str, Any]) -> Rule:
    """Return the rule of FeatCal with the values of its options."""
    return Rule(float(options["alpha"]), float(options["rho"]), float(options["ridge"]))


def regmean_plus_plus(alpha: float) -> Rule:
    """Return the rule of RegMean++; `alpha` is the factor of the elements off the diagonals."""
    return Rule(off_diagonal=alpha, own_blocks=True, normalised=False, with_norms=False)
