"""The methods that learn coefficients, as a user sees them; what they do is the driver's and the trainer's.

Options and defaults are those of `engine.methods.learned.Parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
)

from engine.fields import Float, Int, Section
from engine.methods.options import Method, Option


class ModelParameters(Section):
    """Options that an expert may have of its own; None: the top level's."""

    weight: Float | Literal["auto"] | None = None
    loss_weight: Annotated[Float, Field(ge=0)] | None = None
    samples_per_model: Annotated[Int, Field(ge=1)] | None = None


class Parameters(Section):
    """Options of the method, by the paper's names; the defaults are what `benchmarks/quality` found, see also PAPER."""

    weight: Float | Literal["auto"] = "auto"
    loss_weight: Annotated[Float, Field(ge=0)] = 1.0
    samples_per_model: Annotated[Int, Field(ge=1)] = 8
    task_vectors: Literal["orthogonal", "whole"] = "orthogonal"
    hidden_layers: Literal["middle", "all"] | tuple[Int, ...] = "middle"
    hidden_loss: Literal["mse", "relative"] = "relative"
    hidden_weight: Annotated[Float, Field(ge=0)] = 1.0
    temperature: Annotated[Float, Field(gt=0)] = 2.0
    loss_tokens: Literal["auto", "all", "text", "response"] = "auto"
    regularization: Annotated[Float, Field(ge=0)] = 0.0
    learning_rate: Annotated[Float, Field(gt=0)] = 1.0
    weight_decay: Annotated[Float, Field(ge=0)] = 1e-5
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    gradient_accumulation: Annotated[Int, Field(ge=1)] = 5
    epochs: Annotated[Int, Field(ge=1, le=10_000)] = 8
    budget: Annotated[Float, Field(gt=0, le=1e6)] = 8.0
    kappa: Annotated[Float, Field(ge=0)] = 1.0
    fixed: Literal["prior", "stage1"] = "stage1"
    start: Literal["prior", "stage1"] = "stage1"
    granularity: Literal["layer", "task"] = "layer"


# Defaults of the published command line, where ours are others; and of AdaMerging: its
# paper's prior, no pull back to it, and prompts as they are, since no expert answers them.
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


ADAMERGING = PAPER | {"weight": 0.3, "regularization": 0.0}


ABOUT = {
    "weight": "ᾱₖ, the prior: where learning starts, and what it is pulled back to",
    "loss_weight": "βₖ, what the expert's losses count",
    "samples_per_model": "calibration samples of an expert",
    "task_vectors": "whole, or their leading singular parts made orthogonal (TSV-M), times 4",
    "hidden_layers": "S, the hidden states that are compared: middle, all, or indices",
    "hidden_loss": "of hidden states: mse, or relative to the expert's own variance",
    "hidden_weight": "λ_hid, what the hidden loss counts",
    "temperature": "T of the logit loss",
    "loss_tokens": "whose losses count: all, text (no image), response (from what predicts its first token), or auto",
    "regularization": "γ, the pull back to the prior",
    "learning_rate": "of AdamW on a, α = σ(a)",
    "weight_decay": "of AdamW",
    "max_grad_norm": "the gradient's norm is clipped to it",
    "gradient_accumulation": "samples of an optimiser step",
    "epochs": "how often the samples are gone through",
    "budget": "B, coefficients of an expert as a multiple of the merged tensors",
    "kappa": "κ: 0 spreads chunks evenly, above 1 sharpens the importance",
    "fixed": "what a tensor without chunks keeps: prior or stage1",
    "start": "where stage 2 starts: prior or stage1",
    "granularity": "one coefficient an expert and tensor (layer), or one an expert (task)",
}


SECOND_STAGE = ("budget", "kappa", "fixed", "start")


ALIGNMENT = ("hidden_layers", "hidden_loss", "hidden_weight", "temperature")


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
        "coefficients learned on unlabelled samples, one an expert and tensor",
        "Zhang et al., Expert Merging, arXiv 2509.25712",
        "θ = θ₀ + Σₖ αₖ·τₖ, α = argmin L_logit + λ_hid·L_hid + γ·R",
        _options(("granularity", *SECOND_STAGE)),
        learned=True,
    ),
    Method(
        "expert_merging_pp",
        "the same, and then several coefficients for important tensors",
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
