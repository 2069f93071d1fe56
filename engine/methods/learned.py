"""The learned methods: their options, defaults and descriptions.

The learning itself is in `engine/learning/`. Source: Zhang et al., Expert Merging, arXiv 2509.25712.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.fields import Float, Int, Section
from engine.methods.options import Method, Option

# Defaults of the published command line that differ from those of `Parameters` (`preset: paper`).
PAPER: dict[str, Any] = {
    "weight": 0.1,
    "samples_per_model": 5,
    "task_vectors": "whole",
    "hidden_loss": "mse",
    "temperature": 1.0,
    "loss_tokens": "all",
    "regularization": 5.0,
    "learning_rate": 0.5,
    "gradient_accumulation": 8,
    "epochs": 1,
    "budget": 1.1,
    "fixed": "prior",
    "start": "prior",
}

# Presets by name. `paper` is for any model; the others have the prior and γ of the paper's best results by backbone.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper/internvl": PAPER | {"weight": 0.1, "regularization": 5.0},
    "paper/qwen2-vl": PAPER | {"weight": 0.3, "regularization": 0.8},
    "paper/mistral": PAPER | {"weight": 0.3, "regularization": 0.8},
}

# Defaults of AdaMerging: the prior of its paper, and no regularization.
ADAMERGING = PAPER | {"weight": 0.3, "regularization": 0.0}

# Description of each option, for docs/methods.md and errors.
ABOUT = {
    "weight": "prior ᾱₖ: where learning starts, and what `regularization` pulls to; `auto`: the best common one; "
    "`closed_form`: where least squares on the layers' outputs start each layer",
    "loss_weight": "βₖ, the weight of the expert's losses",
    "samples_per_model": "number of calibration samples of the expert",
    "task_vectors": "`whole`; leading singular parts made `orthogonal` across experts (TSV-M), times 4; or the "
    "experts' shares in the result of `swudi`, times 4; `auto`: `swudi`, or `orthogonal` if any expert is an adapter",
    "hidden_layers": "S, the compared hidden states: `middle`, `all`, or a list of indices",
    "hidden_loss": "`mse`, or `relative`: divided by the variance of the expert's hidden states",
    "hidden_weight": "λ_hid, the weight of the hidden loss",
    "temperature": "T, the temperature of the logit loss",
    "loss_tokens": "positions that count in the losses: `all`, `text` (no images), `response`, or `auto`",
    "regularization": "γ, the strength of the pull towards the prior",
    "learning_rate": "learning rate of AdamW on a, with α = σ(a)",
    "weight_decay": "weight decay of AdamW",
    "max_grad_norm": "maximum norm of the gradient, enforced by clipping",
    "gradient_accumulation": "samples per optimiser step",
    "epochs": "passes over the samples",
    "budget": "B, the coefficients per expert as a multiple of the number of merged tensors",
    "kappa": "κ, the exponent of the importance: 0 spreads the chunks evenly, above 1 sharpens the differences",
    "chunks": "`contiguous`: pieces of a tensor; `spectral`: groups of singular directions; `direction`: each",
    "fixed": "coefficient of a tensor without chunks: `prior`, or `stage1` for its value of stage 1",
    "start": "start of stage 2: `prior`, or `stage1` for the coefficients of stage 1",
    "granularity": "`layer`: one coefficient per expert and tensor; `task`: one per expert",
}

# Options of stage 2, and of the losses against the expert's targets: those that some methods lack.
SECOND_STAGE = ("budget", "kappa", "chunks", "fixed", "start")
ALIGNMENT = ("hidden_layers", "hidden_loss", "hidden_weight", "temperature")


# The most of a weight or a rate: beyond it float32 overflows.
MOST = 1e6


class ModelParameters(Section):
    """Options of one expert; None means the merge's value in `Parameters`."""

    weight: Float | Literal["auto"] | None = None
    loss_weight: Annotated[Float, Field(ge=0, le=MOST)] | None = None
    samples_per_model: Annotated[Int, Field(ge=1, le=1_000_000)] | None = None


class Parameters(Section):
    """Options of a merge. The defaults were chosen by `benchmarks/quality`; `PAPER` has those of the published code."""

    weight: Float | Literal["auto", "closed_form"] = "auto"
    loss_weight: Annotated[Float, Field(ge=0, le=MOST)] = 1.0
    samples_per_model: Annotated[Int, Field(ge=1, le=1_000_000)] = 8
    task_vectors: Literal["auto", "orthogonal", "swudi", "whole"] = "auto"
    hidden_layers: Literal["middle", "all"] | tuple[Int, ...] = "middle"
    hidden_loss: Literal["mse", "relative"] = "relative"
    hidden_weight: Annotated[Float, Field(ge=0, le=MOST)] = 1.0
    temperature: Annotated[Float, Field(ge=1e-3, le=1e3)] = 2.0
    loss_tokens: Literal["auto", "all", "text", "response"] = "auto"
    regularization: Annotated[Float, Field(ge=0, le=MOST)] = 0.0
    learning_rate: Annotated[Float, Field(gt=0, le=MOST)] = 1.0
    weight_decay: Annotated[Float, Field(ge=0, le=MOST)] = 1e-5
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    gradient_accumulation: Annotated[Int, Field(ge=1, le=1_000_000)] = 5
    epochs: Annotated[Int, Field(ge=1, le=10_000)] = 8
    budget: Annotated[Float, Field(gt=0, le=1e6)] = 8.0
    kappa: Annotated[Float, Field(ge=0, le=100)] = 1.0
    chunks: Literal["contiguous", "spectral", "direction"] = "contiguous"
    fixed: Literal["prior", "stage1"] = "stage1"
    start: Literal["prior", "stage1"] = "stage1"
    granularity: Literal["layer", "task"] = "layer"


def _options(without: tuple[str, ...], defaults: Mapping[str, Any] = MappingProxyType({})) -> tuple[Option, ...]:
    return tuple(
        Option(
            name,
            defaults.get(name, field.default),
            ABOUT[name],
            "expert" if name in ModelParameters.model_fields else "merge",
            kind=type(defaults.get(name, field.default)),
        )
        for name, field in Parameters.model_fields.items()
        if name not in without
    )


METHODS = (
    Method(
        "expert_merging",
        "coefficients learned from unlabelled samples, one per expert and tensor",
        "Zhang et al., Expert Merging, arXiv 2509.25712",
        "θ = θ₀ + Σₖ αₖ·τₖ, α = argmin L_logit + λ_hid·L_hid + γ·R",
        _options(("granularity", *SECOND_STAGE)),
        learned=True,
    ),
    Method(
        "expert_merging_pp",
        "Expert Merging, then a second stage with several coefficients for important tensors",
        "Zhang et al., Expert Merging, arXiv 2509.25712 (Expert Merging++)",
        "θ = θ₀ + Σₖ Σₛ αₖ,ₛ·τₖ,ₛ",
        _options(("granularity",)),
        learned=True,
    ),
    Method(
        "adamerging",
        "coefficients that minimise the entropy of the merged model's predictions",
        "Yang et al., AdaMerging, arXiv 2310.02575",
        "θ = θ₀ + Σₖ αₖ·τₖ, α = argmin mean over tokens of H(softmax(z))",
        _options((*ALIGNMENT, *SECOND_STAGE), ADAMERGING),
        learned=True,
    ),
)
