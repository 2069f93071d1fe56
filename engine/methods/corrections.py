"""The steps after a merge (`calibrate`): their options, defaults and descriptions.

Each changes the weights of a merged model, of whatever method. Their arithmetic is in `engine.methods.arithmetic` and
`engine.correction`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, model_serializer

from engine.fields import Section
from engine.methods.options import Footprint, Method, Option, Value

FEATCAL = Method(
    "featcal",
    "linear layers solved block by block so that their outputs on samples are the experts'",
    "FeatCal, arXiv 2605.13030",
    "W = (Σₖ Wₖ·Tₖ·Sₖᵀ/‖Cₖ‖ + ridge·A)·(Σₖ Cₖ/‖Cₖ‖ + ridge·I)⁻¹, A = rho·W_merged + (1 − rho)·W₀",
    (
        Option("alpha", 0.3, "share of the expert's own inputs in the inputs Tₖ of its layers", low=0, high=1),
        Option("rho", 2.0, "ρ of the anchor A, from the base (0) through the merged model (1)"),
        Option("ridge", 0.05, "λ, the pull towards the anchor", low=0),
    ),
    by_blocks=True,
)
SVC = Method(
    "svc",
    "singular values of the merged task vector divided by how often the experts count them (SVC)",
    "Spectral calibration, arXiv 2602.05536",
    "σᵣ ← K·σᵣ / Σₖ max(alpha, ⟨aᵣ, aᵣₖ⟩/‖aᵣₖ‖²), aᵣ = τᵀuᵣ, aᵣₖ = τₖᵀuᵣ",
    (Option("alpha", 0.1, "the least count of an expert; 1 only shrinks singular values", low=1e-3),),
    footprint=Footprint(),
)
AIM = Method(
    "aim",
    "merged task vectors damped where the base's inputs are large (AIM)",
    "Activation-Informed Merging, arXiv 2502.02421",
    "τ ← τ·diag(1 − s·(1 − omega)), s = mean |x| / max mean |x| of the base's inputs x",
    (Option("omega", 0.4, "ω, what is left of the change at the largest inputs", low=0, high=1),),
    footprint=Footprint(),
    base_statistics=("activations",),
)
CORRECTIONS = {method.name: method for method in (FEATCAL, SVC, AIM)}


def _named(value: Any) -> Any:
    """Return `featcal` or `{method: featcal, alpha: 0.3}` as a mapping with the values of all options."""
    given = {"method": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or given.get("method") not in CORRECTIONS:
        raise ValueError(f"one of {', '.join(CORRECTIONS)}, or a mapping with such a `method` and its options")
    inner = given.get("options")
    own = inner if isinstance(inner, dict) else given
    method = CORRECTIONS[given["method"]]
    unknown = [key for key in own if key not in ("method", *method.by_name)]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not an option of {method.name}: {', '.join(method.by_name)}")
    return {
        "method": method.name,
        "options": {name: option.value(own.get(name, option.default)) for name, option in method.by_name.items()},
    }


class Correction(Section):
    """A step after a merge: its name, and the value of each of its options."""

    method: str
    options: dict[str, Value]

    def __str__(self) -> str:
        """Return the step as a reader sees it: its name and the values of its options."""
        return f"{self.method} ({', '.join(f'{name} {value}' for name, value in self.options.items())})"

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        return {"method": self.method, **self.options}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


Named = Annotated[Correction, BeforeValidator(_named, json_schema_input_type=str | dict[str, Any])]
Corrections = Annotated[
    tuple[Named, ...],
    BeforeValidator(_listed, json_schema_input_type=str | dict[str, Any] | list[str | dict[str, Any]] | None),
]
