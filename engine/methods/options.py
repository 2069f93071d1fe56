"""Methods and options as data: names, sources, formulas, defaults, and the evaluation of settings. Free of torch.

A setting is the value of an option in a YAML, in one of mergekit's forms: a value; a list of values, which is a
gradient over the layers; `{filter, value}`; or a list of `{filter, value}`, of which the first applies whose `filter`
is part of the tensor's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pydantic

Value = bool | int | float | str
Setting = Any
Settings = Mapping[str, Setting]
Statistic = Literal["activations", "gram", "fisher", "sensitivity"]


@dataclass(frozen=True)
class Option:
    """An option of a method.

    Attributes:
        name: Its key in the config.
        default: Its default; None for a required option.
        about: One line for docs/methods.md, and the `expected` part of errors.
        scope: `merge`: one value per tensor. `expert`: one per expert and tensor. `model`: as `expert`, and one for the
            base if it is one of the models.
        kind: Type of a value, as pydantic validates it.
        choices: The allowed values, if not all of the type are.
        low, high: Bounds of a number, inclusive.
        required: The option has no default.
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
        """Name of the type."""
        return getattr(self.kind, "__name__", str(self.kind))

    @cached_property
    def _adapter(self) -> pydantic.TypeAdapter[Any]:
        return pydantic.TypeAdapter(self.kind)

    def value(self, given: Any) -> Value:
        """Return `given` converted to the option's type.

        Raises:
            ValueError: it has another type, or is none of the choices, or out of bounds.
        """
        if isinstance(given, bool) and self.kind is not bool:
            raise ValueError(f"{given} is not of type {self.kind_name}")
        try:
            value: Value = self._adapter.validate_python(given)
        except pydantic.ValidationError as error:
            raise ValueError(f"{given!r} is not of type {self.kind_name}") from error
        if self.choices and value not in self.choices:
            raise ValueError(f"{given!r} is not one of {', '.join(self.choices)}")
        if isinstance(value, int | float) and not (math.isfinite(value) and self.low <= value <= self.high):
            raise ValueError(f"{given!r} is not between {self.low:g} and {self.high:g}")
        return value

    def check(self, setting: Setting) -> None:
        """Check the form of a setting and each of its values.

        Raises:
            ValueError: a value is not allowed, or the setting has an unknown form.
        """
        for value in _values(setting):
            self.value(value)

    def resolve(self, scopes: Iterable[Settings | None], tensor: str, depth: float) -> Value | None:
        """Return the option's value for a tensor.

        Args:
            scopes: Settings in order of precedence. The first with a value for the tensor applies, else the default.
            tensor: The tensor's name.
            depth: Position of the tensor's layer, from 0 (first) to 1 (last).
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
            raise ValueError("a mapping must have `value`, optionally `filter`, and no other key")
        if not isinstance(setting.get("filter"), str | None):
            raise ValueError("`filter` must be a text, a part of a tensor's name")
        yield from _values(setting["value"])
    elif isinstance(setting, list):
        mappings = sum(isinstance(item, Mapping) for item in setting)
        if 0 < mappings < len(setting):
            raise ValueError("a list must not mix values and {filter, value}")
        if not setting:
            raise ValueError("a list must not be empty")
        if any(isinstance(item, list) for item in setting):
            raise ValueError("a list must not contain lists")
        for item in setting:
            yield from _values(item)
    else:
        yield setting


def _evaluate(setting: Setting, tensor: str, depth: float, of: Callable[[Any], Value]) -> Value | None:
    conditions = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(conditions, list):
        return of(conditions)
    if isinstance(conditions[0], Mapping):
        for condition in conditions:
            part = condition.get("filter")
            if part is None or part == "*" or part in tensor:
                return _evaluate(condition["value"], tensor, depth, of)
        return None
    values = [of(item) for item in conditions]
    place = depth * (len(values) - 1)
    below = int(place)
    if any(isinstance(value, bool | str) for value in values):
        return values[below]
    above = min(below + 1, len(values) - 1)
    fraction = place - below
    return of((1 - fraction) * float(values[below]) + fraction * float(values[above]))


@dataclass(frozen=True)
class Footprint:
    """What a method holds at its peak while it works on a matrix [O, I], in float32. Measured.

    Attributes:
        copies: Matrices [O, I].
        per_expert: Matrices [O, I] for each expert.
        squares: Matrices [I, I].
    """

    copies: float = 8
    per_expert: float = 0
    squares: float = 0

    def nbytes(self, shape: Sequence[int], experts: int) -> int:
        """Return the bytes for a tensor of this shape."""
        inputs = shape[-1] if len(shape) == 2 else 0
        return int(4 * ((self.copies + self.per_expert * experts) * math.prod(shape) + self.squares * inputs**2))


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: Its `merge_method` in the config.
        summary: A noun phrase for lists of methods.
        source: The paper.
        formula: The merged tensor.
        options: Its options.
        base: Whether `base_model` is required. `ignored`: a base is a model like the others.
        outputs: One merged model, or one per expert.
        footprint: What it holds of a whole tensor at a time; None: a bounded number of elements.
        aliases: Other names accepted in a config.
        learned: Its coefficients are learned.
        least, most: Bounds of the number of models, the base included.
        statistics: What it needs of each expert: `activations` (the diagonal moments of the inputs of linear layers),
            `gram` (their Gram matrices, and the diagonal), `fisher` or `sensitivity`; see `engine.statistics`.
        base_statistics: What it needs of the base.
        by_blocks: It runs the merged model and the experts block by block on samples; see `engine.correction`.
        check: Checks a tensor's values together: called with its name, the names of its experts, and the values of the
            merge, of each expert, and of the base (None if it is not one of the models). Raises ConfigError.
    """

    name: str
    summary: str
    source: str
    formula: str
    options: tuple[Option, ...] = ()
    base: Literal["required", "optional", "ignored"] = "required"
    outputs: Literal["one", "experts"] = "one"
    footprint: Footprint | None = None
    aliases: tuple[str, ...] = ()
    learned: bool = False
    least: int = 1
    most: int | None = None
    statistics: tuple[Statistic, ...] = ()
    base_statistics: tuple[Statistic, ...] = ()
    by_blocks: bool = False
    check: Callable[[str, Sequence[str], Settings, Sequence[Settings], Settings | None], object] | None = None

    @cached_property
    def by_name(self) -> dict[str, Option]:
        """The options, by name."""
        return {option.name: option for option in self.options}

    @property
    def runs_models(self) -> bool:
        """Whether it runs models on calibration samples, unless their statistics are given."""
        return bool(self.learned or self.statistics or self.base_statistics or self.by_blocks)


# Options shared by several methods.
WEIGHT = Option("weight", 0.1, "wₖ, the coefficient of the expert's task vector", "expert")
DENSITY = Option("density", 1.0, "fraction of the task vector's elements that is kept", "expert", low=0, high=1)
SAMPLES = Option(
    "samples_per_model", 64, "number of calibration samples of the expert", "expert", kind=int, low=1, high=1_000_000
)
LAMBDA = Option("lambda", 1.0, "λ, the factor of the sum of the task vectors")
INT8_MASK = Option("int8_mask", False, "accepted for mergekit's configs; has no effect", kind=bool)


def normalize(default: bool) -> Option:
    """Return the option `normalize`: division of a weighted sum by the sum of the weights."""
    return Option("normalize", default, "divide by the sum of the weights", kind=bool)


def rescale(default: bool) -> Option:
    """Return the option `rescale`: scaling of the kept elements to make up for the dropped ones."""
    return Option(
        "rescale",
        default,
        "scale the kept elements so that the tensor's sum of absolute values is preserved",
        kind=bool,
    )
