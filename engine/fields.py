"""Types of the config's keys for pydantic: numbers that refuse booleans, patterns, sizes, lists, and sections."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

T = TypeVar("T")


def not_bool(value: Any) -> Any:
    """Return `value`, or refuse true and false, which pydantic would convert to 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"a regular expression ({error})") from error
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bytes(value: Any) -> Any:
    """Parse a size such as 5GB with powers of 1000, as transformers does."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)\s*([KMGT]?)B?", value.strip(), flags=re.IGNORECASE)):
        return int(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
    return not_bool(value)


Int = Annotated[int, BeforeValidator(not_bool), Field(ge=-(2**63), lt=2**63)]
Float = Annotated[float, BeforeValidator(not_bool)]
Pattern = Annotated[str, AfterValidator(_pattern)]
# A number of bytes, or a text such as 5GB.
ByteSize = Annotated[Int, BeforeValidator(_bytes, json_schema_input_type=int | str)]
# A list, or the text that would be its only entry.
Listed = Annotated[tuple[T, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])]


class Section(BaseModel):
    """Base class of the config's sections: frozen, without unknown keys, NaN or infinity."""

    # protected_namespaces: mergekit's keys begin with `model`, a prefix that pydantic reserves by default.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
