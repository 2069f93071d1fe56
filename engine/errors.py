"""One tree of user-facing errors.

An error says what is wrong, where, what was expected and what to do, in one or a few lines; the command line prints it
and exits with its code. Knows nothing of the rest. A broken promise of our own code is an assert, not one of these.
"""

from __future__ import annotations

from typing import Any


class MergeError(Exception):
    """What a user is told when a merge cannot go on.

    `what` is one sentence; `where` a file, line, key or tensor; `expected` and `do` are optional sentences.
    """

    exit_code = 4

    def __init__(self, what: str, where: str = "", expected: str = "", do: str = "") -> None:
        super().__init__(what, where, expected, do)
        self.what, self.where, self.expected, self.do = what, where, expected, do

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [f"  expected: {self.expected}"] if self.expected else []
        lines += [f"  do: {self.do}"] if self.do else []
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders; __str__ must read the same on the other side.
        return type(self), (self.what, self.where, self.expected, self.do)


class InputError(MergeError):
    """The user's input is wrong (exit 2)."""

    exit_code = 2


class ConfigError(InputError):
    """The YAML or a command line option is wrong."""


class CheckpointError(InputError):
    """A model folder, one of its files or one of its tensors is wrong."""


class CalibrationError(InputError):
    """A calibration file or record is wrong."""


class OutputError(InputError):
    """The output folder cannot be used."""


class ClusterError(MergeError):
    """The cluster cannot serve (exit 3)."""

    exit_code = 3


class RunError(MergeError):
    """The run failed (exit 4)."""


class StorageError(RunError):
    """A disk or an object storage refused; what was there before is as it was."""
