"""Assert that code refuses with a given error, by its class and its facts rather than by its wording."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from engine.errors import MergeError

E = TypeVar("E", bound=MergeError)


@contextmanager
def refused(
    error_type: type[E], where: str = "", do: str = "", *, facts: Iterable[str] = ()
) -> Iterator[pytest.ExceptionInfo[E]]:
    """Like `pytest.raises(error_type)`, and checks what the error says.

    Args:
        error_type: The class of the error, or one of its base classes.
        where: Text that must occur in the error's `where`: a file, line, key or tensor.
        do: Text that must occur in the error's `do`, such as the name of an option.
        facts: Texts that must each occur in `str(error)`: names, numbers, paths. Not prose.

    Yields:
        The `ExceptionInfo` that `pytest.raises` yields, for further checks after the block.
    """
    if isinstance(facts, str):
        raise TypeError(f"facts is a collection of texts, not one text: {facts!r}")
    with pytest.raises(error_type) as caught:
        yield caught
    error = caught.value
    assert where in error.where, f"where: {where!r} not in {error.where!r}"
    assert do in error.do, f"do: {do!r} not in {error.do!r}"
    missing = [fact for fact in facts if fact not in str(error)]
    assert not missing, f"{missing} not in {str(error)!r}"
