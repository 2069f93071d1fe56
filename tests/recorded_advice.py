"""The advice in tests/golden/messages.txt, and which tests follow it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from engine.errors import MergeError
from engine.planning.plan import Plan
from engine.run.inputs import identity
from engine.run.run_folder import open_run

RECORD = Path(__file__).parent / "golden" / "messages.txt"
Test = TypeVar("Test", bound=Callable[..., object])


class Advice:
    """The messages with advice of some modules, each as its `what` and its `do`, and the parts of them that are known.

    Args:
        modules: Starts of the paths of the modules.
        elsewhere: Part of a message, and the test that follows its advice, or the reason why none does.
    """

    def __init__(self, *modules: str, elsewhere: Mapping[str, str]) -> None:
        self._known = set(elsewhere)
        self._recorded = set()
        for section in RECORD.read_text(encoding="utf-8").split("\n\n\n"):
            name, *messages = section.strip().split("\n\n")
            if name.removeprefix("# ").startswith(modules):
                self._recorded |= {message for message in messages if "\n  do: " in message}

    def followed(self, *parts: str) -> Callable[[Test], Test]:
        """Return a decorator of a test that follows the advice of the messages with these parts."""
        self._known.update(parts)
        return lambda test: test

    def check(self) -> None:
        """Assert that every message has a known part, and that every known part is in a message."""
        new = {message for message in self._recorded if not any(part in message for part in self._known)}
        old = {part for part in self._known if not any(part in message for message in self._recorded)}
        assert not new and not old, "\n\n".join(["not followed:", *new, "not in messages.txt:", *old])


def refusal(call: Callable[[], object]) -> MergeError:
    """Return the error that a call raises."""
    with pytest.raises(MergeError) as caught:
        call()
    return caught.value


def found(pattern: str, error: MergeError) -> re.Match[str]:
    """Return the match of a regular expression in the advice of an error."""
    match = re.search(pattern, error.do)
    assert match is not None, f"{pattern!r} is not in the advice of: {error}"
    return match


def begins(out: Path, before: Plan, error: MergeError, after: Plan) -> None:
    """Begin a merge where a run of `before` ended with an error, with --fresh if its advice names that."""
    with open_run(str(out), identity(before), fresh=False) as run:
        run.state.write("stage-1.safetensors", b"a result")
    with open_run(str(out), identity(after), fresh="--fresh" in error.do):
        pass
