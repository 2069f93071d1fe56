"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)


def not_bool(value: Any) -> Any:
    """Return `value`, refusing true and false, which pydantic would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Int = Annotated[int, BeforeValidator(not_bool), Field(ge=-(2**63), lt=2**63)]


Float = Annotated[float, BeforeValidator(not_bool)]


class Section(BaseModel):
    """Base class of the config's parts: frozen, without unknown keys, without NaN and infinity."""

    # protected_namespaces: `model` is mergekit's word for a model's path and must stay ours.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
