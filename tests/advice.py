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
# Starts of the paths of the modules whose advice is followed, by the file of tests that follows it.
FOLLOWED = {
    "test_advice": (
        "engine/calibration",
        "engine/checkpoints",
        "engine/config",
        "engine/models/loading",
        "engine/models/names",
        "engine/models/vocabularies",
        "engine/planning",
        "engine/run/preparation",
    ),
    "test_advice_on_extensions": ("cluster/extension",),
    "test_advice_on_documents": ("cluster/documents", "engine/output/outline"),
    "test_advice_on_clusters": (
        "cluster/placement",
        "cluster/processes",
        "cluster/readiness",
        "cluster/telemetry",
        "cluster/watch",
        "cluster/ray_watch",
    ),
    "test_advice_on_merges": (
        "actors/",
        "engine/learning",
        "engine/methods",
        "engine/models/blocks",
        "engine/models/devices",
        "engine/models/forward",
        "engine/shards",
        "engine/task_vectors",
    ),
    "test_advice_on_places": ("engine/run/ownership", "engine/run/place"),
    "test_advice_on_ray": ("cluster/session", "engine/machine"),
    "test_advice_on_results": (
        "cluster/callback",
        "cluster/commands",
        "cluster/evaluation",
        "engine/evaluation",
        "engine/report",
    ),
    "test_advice_on_storage": ("engine/storage",),
    "test_search": ("engine/search", "cluster/search"),
    "test_statistics_on_ray": ("engine/statistics/files",),
    "test_outlook": ("cluster/outlook",),
    "test_optimizer_state": ("engine/statistics/optimizer_state",),
    "test_push": ("engine/output/push",),
}


class Advice:
    """The messages with advice that a file of tests follows, as they are recorded, and the parts that are known.

    Args:
        tests: The file's name in `FOLLOWED`.
        elsewhere: Part of a message, and the test that follows its advice, or the reason why none does.
    """

    def __init__(self, tests: str, elsewhere: Mapping[str, str]) -> None:
        self._known = set(elsewhere)
        modules = FOLLOWED[tests.rpartition(".")[2]]
        self._recorded = {m for name, messages in with_advice().items() if name.startswith(modules) for m in messages}

    def followed(self, *parts: str) -> Callable[[Test], Test]:
        """Return a decorator of a test that follows the advice of the messages with these parts."""
        self._known.update(parts)
        return lambda test: test

    def check(self) -> None:
        """Assert that every message has a known part, and that every known part is in a message."""
        new = {message for message in self._recorded if not any(part in message for part in self._known)}
        old = {part for part in self._known if not any(part in message for message in self._recorded)}
        assert not new and not old, "\n\n".join(["not followed:", *new, "not in messages.txt:", *old])


def with_advice() -> dict[str, list[str]]:
    """Return the recorded messages that have a `do`, by the path of their module."""
    found = {}
    for section in RECORD.read_text(encoding="utf-8").split("\n\n\n"):
        name, *messages = section.strip().split("\n\n")
        if advice := [message for message in messages if "\n  do: " in message]:
            found[name.removeprefix("# ")] = advice
    return found


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
