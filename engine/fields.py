"""Strict pydantic types: numbers that refuse booleans, and the base class of the config's sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def not_bool(value: Any) -> Any:
    """Return `value`, or refuse true and false, which pydantic would convert to 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Int = Annotated[int, BeforeValidator(not_bool), Field(ge=-(2**63), lt=2**63)]
Float = Annotated[float, BeforeValidator(not_bool)]


class Section(BaseModel):
    """Base class of the config's sections: frozen, without unknown keys, NaN or infinity."""

    # protected_namespaces: mergekit's keys begin with `model`, a prefix that pydantic reserves by default.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
