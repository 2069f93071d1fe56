"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_not_bool), Field(ge=-(2**63), lt=2**63)]


Float = Annotated[float, BeforeValidator(_not_bool)]


class _Section(BaseModel):
    # protected_namespaces: `model` is mergekit's word for a model's path and must stay ours.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
