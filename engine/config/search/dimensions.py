"""The keys of a search's space and their values: what is one, and what goes together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.search.settings import OF_SEVERAL, Search, Value
from engine.config.yaml_text import DEPTH, DIGITS, Location, Where, check_keys
from engine.errors import ConfigError
from engine.untrusted import shown

RANGE = ("low", "high", "log", "integer")
# The keys of a config that a trial may change: options, and methods. Anything else would be another merge to prepare.
ROOTS = ("merge_method", "parameters", "models", "slices", "modules", "calibrate")
PLACES = "`merge_method`, `parameters.…`, `models.*.parameters.…`, `slices.…`, `modules.…` or `calibrate.…`"
FORMS = "a list of at least two values, or a mapping with `low` and `high`, and `log` or `integer`"


@dataclass(frozen=True)
class Dimension:
    """The values of a key: those of `choices`, or the numbers from `low` to `high`, both included.

    `log`: the logarithm is searched evenly. `integer`: whole numbers only.
    """

    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    @property
    def ends(self) -> tuple[Value, Value]:
        """The first and the last value."""
        if self.choices:
            return self.choices[0], self.choices[-1]
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    def has(self, value: Any) -> bool:
        """Return whether a value is one of these."""
        if self.choices:
            return any(type(value) is type(one) and value == one for one in self.choices)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.integer or value == int(value))


def read_dimension(given: Any, name: str, at: str) -> Dimension:
    """Return the values that the YAML gives to a key of the space. `at`: the place that errors name.

    Raises:
        ConfigError: They have another form, or the range is empty.
    """
    if isinstance(given, list):
        scalars = all(isinstance(one, Value) for one in given)
        if not scalars or len({(type(one), one) for one in given}) < max(2, len(given)):
            raise ConfigError(f"{name} is {shown(repr(given))}", at, FORMS)
        return Dimension(tuple(given))
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys():
        raise ConfigError(f"{name} is {shown(repr(given))}", at, FORMS)
    check_keys(given, RANGE, ("search", "space", name), lambda _: at)
    low, high = (_number(given[key]) for key in ("low", "high"))
    if low is None or high is None or not low < high:
        raise ConfigError(f"the range of {name} is empty: {shown(repr(given))}", at, "`low` below `high`, both finite")
    log, integer = given.get("log", False), given.get("integer", False)
    if not isinstance(log, bool) or not isinstance(integer, bool):
        raise ConfigError(f"{name} is {shown(repr(given))}", at, "`log` and `integer` true or false")
    if log and low <= 0:
        raise ConfigError(f"the range of {name} begins at {low:g}", at, "`low` above 0, with `log`")
    if integer and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"the range of {name} is from {low:g} to {high:g}", at, "whole numbers, with `integer`")
    return Dimension(low=low, high=high, log=log, integer=integer)


def _number(value: Any) -> float | None:
    """Return a finite number, which YAML 1.1 may read as a text (1e-5); None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def names_of(key: str) -> tuple[str, ...]:
    """Return the parts of a key of the space."""
    return tuple(key.split("."))


def check_space(search: Search, where: Where) -> None:
    """Check the space and what goes together with it.

    Raises:
        ConfigError: The space is empty, a key is none that a trial may change, the values of a key are no values, or
            the algorithm cannot search them.
    """
    if not search.space:
        raise ConfigError("the space of the search is empty", where(("search", "space")), f"keys: {PLACES}")
    for key, given in search.space.items():
        place: Location = ("search", "space", key)
        _check_key(names_of(key), where(place))
        dimension = read_dimension(given, key, where(place))
        if search.algorithm == "cmaes" and (dimension.choices or dimension.integer):
            raise ConfigError(
                f"cmaes searches numbers, and the values of {key} are {shown(repr(given))}",
                where(place),
                "`low` and `high`, without `integer`",
                "use another `algorithm`, such as tpe",
            )
    several = search.objective != "kl" and len(search.objective) > 1
    if search.objective != "kl" and not search.objective:
        raise ConfigError("the objective has no data", where(("search", "objective")), "`kl`, or at least one part")
    if search.algorithm in OF_SEVERAL and search.rungs > 1:
        what = f"{search.algorithm} has an objective for each part, of which none alone can end a trial"
        raise ConfigError(what, where(("search", "rungs")), "`rungs: 1`")
    if search.algorithm in OF_SEVERAL and not (several or search.objective == "kl"):
        what = f"{search.algorithm} finds trade-offs between several objectives, and there is one"
        raise ConfigError(what, where(("search", "algorithm")), do="use tpe, or give more parts")


def _check_key(names: Sequence[str], at: str) -> None:
    known = all(0 < len(name) <= DIGITS for name in names) and len(names) <= DEPTH and names[0] in ROOTS
    if known and names[0] == "models":
        known = len(names) > 3 and names[2] == "parameters"
    elif known and names[0] != "merge_method":
        known = len(names) > 1
    if not known:
        raise ConfigError(f"a trial cannot change {shown('.'.join(names))!r}", at, PLACES)
