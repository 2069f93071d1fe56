"""What a method is to a user: its name, source and formula, its options and their defaults. No arithmetic, no torch.

A setting is what a YAML gives for an option, in mergekit's forms: a value; a list of values, which is a gradient over
the layers; `{filter, value}`, or a list of those, of which the first whose `filter` is part of the tensor's name
counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pydantic

Value = bool | int | float | str


Setting = Any


Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Option:
    """One option of a method; its type is that of `kind`.

    `scope`: `merge`, one value a tensor; `expert`, one an expert and tensor; `model`, as `expert`, and one for the base
    where it takes part. `required`: there is no default, so one has to be given.
    """

    name: str
    default: Value | None
    about: str
    scope: Literal["merge", "expert", "model"] = "merge"
    kind: Any = float
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    required: bool = False

    @property
    def kind_name(self) -> str:
        """The type in a word."""
        return getattr(self.kind, "__name__", str(self.kind))

    @cached_property
    def _adapter(self) -> pydantic.TypeAdapter[Any]:
        return pydantic.TypeAdapter(self.kind)

    def value(self, given: Any) -> Value:
        """What was given, as the option's type.

        Raises:
            ValueError: it is of another type, or out of bounds.
        """
        if isinstance(given, bool) and self.kind is not bool:
            raise ValueError(f"{given} is no {self.kind_name}")
        try:
            value: Value = self._adapter.validate_python(given)
        except pydantic.ValidationError as error:
            raise ValueError(f"{given!r} is no {self.kind_name}") from error
        if self.choices and value not in self.choices:
            raise ValueError(f"{given!r} is none of {', '.join(self.choices)}")
        if isinstance(value, int | float) and not (math.isfinite(value) and self.low <= value <= self.high):
            raise ValueError(f"{given!r} is not within {self.low:g} and {self.high:g}")
        return value

    def check(self, setting: Setting) -> None:
        """Look at every value of a setting.

        Raises:
            ValueError: one is not allowed, or the setting has no form that is known.
        """
        for value in _values(setting):
            self.value(value)

    def resolve(self, scopes: Iterable[Settings | None], tensor: str, depth: float) -> Value | None:
        """The value for a tensor: that of the first of the scopes which says one, else the default.

        `depth`: where the tensor's layer stands between the first (0) and the last (1).
        """
        for scope in scopes:
            if scope is not None and self.name in scope:
                value = _evaluate(scope[self.name], tensor, depth, self.value)
                if value is not None:
                    return value
        return self.default


def _values(setting: Setting) -> Iterator[Any]:
    if isinstance(setting, Mapping):
        if "value" not in setting or set(setting) - {"filter", "value"}:
            raise ValueError("a mapping has `value`, and `filter` where it is for some tensors only")
        if not isinstance(setting.get("filter"), str | None):
            raise ValueError("`filter` is part of a tensor's name")
        yield from _values(setting["value"])
    elif isinstance(setting, list):
        if any(isinstance(one, Mapping) for one in setting) and not all(isinstance(one, Mapping) for one in setting):
            raise ValueError("a list has values or {filter, value}, not both")
        if not setting:
            raise ValueError("a list has at least one value")
        if any(isinstance(one, list) for one in setting):
            raise ValueError("a list has no lists in it")
        for one in setting:
            yield from _values(one)
    else:
        yield setting


def _evaluate(setting: Setting, tensor: str, depth: float, of: Callable[[Any], Value]) -> Value | None:
    conditions = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(conditions, list):
        return of(conditions)
    if isinstance(conditions[0], Mapping):
        for condition in conditions:
            wanted = condition.get("filter")
            if wanted is None or wanted == "*" or wanted in tensor:
                return _evaluate(condition["value"], tensor, depth, of)
        return None
    values = [of(one) for one in conditions]
    place = depth * (len(values) - 1)
    below = int(place)
    if any(isinstance(value, bool | str) for value in values):
        return values[below]
    above = min(below + 1, len(values) - 1)
    part = place - below
    return of((1 - part) * float(values[below]) + part * float(values[above]))


@dataclass(frozen=True)
class Method:
    """A method: `summary` in one line, `source` (paper), `formula` of one tensor, its options.

    `base`: whether θ₀ must be given. `outputs`: one model, or one an expert. `whole`: it holds whole tensors in memory,
    a bounded number whatever the number of experts; else a bounded number of elements.
    """

    name: str
    summary: str
    source: str
    formula: str
    options: tuple[Option, ...] = ()
    base: Literal["required", "optional"] = "required"
    outputs: Literal["one", "experts"] = "one"
    whole: bool = False
    aliases: tuple[str, ...] = ()
    learned: bool = False

    @cached_property
    def by_name(self) -> dict[str, Option]:
        """The options by their names."""
        return {option.name: option for option in self.options}


# What several methods share.
WEIGHT = Option("weight", 0.1, "wₖ, the coefficient of the expert's task vector", "expert")


DENSITY = Option("density", 1.0, "the part of the task vector's elements that is kept", "expert", low=0, high=1)


LAMBDA = Option("lambda", 1.0, "λ, what the sum of the task vectors is multiplied by")


INT8_MASK = Option("int8_mask", False, "of mergekit's configs; changes nothing here", kind=bool)


def normalize(default: bool) -> Option:
    """Whether a sum is divided by the sum of its weights."""
    return Option("normalize", default, "divide by the sum of the weights", kind=bool)


def rescale(default: bool) -> Option:
    """Whether elements that are kept are scaled up for those that are not."""
    return Option(
        "rescale", default, "scale what is kept, so that the tensor's sum of absolute values is as before", kind=bool
    )
