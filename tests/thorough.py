"""Parameters of tests of which most are thorough: the fast set keeps those in which a mistake shows soonest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thorough_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return the values for `pytest.mark.parametrize`, those that are not in `quick` marked as thorough.

    A tuple is one value for each of several parameters.
    """
    values = list(values)
    assert all(value in values for value in quick), "not all of `quick` are among the values"
    return [value if value in quick else as_thorough(value) for value in values]


def as_thorough(value: Any) -> Any:
    """Return a value for `pytest.mark.parametrize`, marked as thorough."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough)
