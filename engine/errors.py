"""Errors for users, in one class hierarchy.

An error states the problem, its place, the expected value and a remedy. The command line prints it and exits with the
exit code of its class. Violated assumptions about our own code are asserts instead.
"""

from __future__ import annotations

import unicodedata
from typing import Any

# Unicode categories of characters that can control a terminal or disguise a text: control, format, surrogate, line
# separator, paragraph separator.
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class MergeError(Exception):
    """Base class of errors for users; the exit code of the command line is `exit_code`.

    Args:
        what: The problem, in one short sentence without a capital or a full stop.
        where: The file, line, key or tensor.
        expected: The expected value.
        do: The remedy, in the imperative.
    """

    exit_code = 4

    def __init__(self, what: str, where: str = "", expected: str = "", do: str = "") -> None:
        super().__init__(what, where, expected, do)
        self.what, self.where, self.expected, self.do = what, where, expected, do

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [f"  expected: {self.expected}"] if self.expected else []
        lines += [f"  do: {self.do}"] if self.do else []
        # Names of files and quotations come from outside.
        text = "\n".join(lines)
        return "".join(
            char if char == "\n" or unicodedata.category(char) not in UNSEEN else repr(char)[1:-1] for char in text
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries, and their text must be the same on the other side.
        return type(self), (self.what, self.where, self.expected, self.do)


class InputError(MergeError):
    """The user's input is invalid (exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """The config or a command line option is invalid."""


class CheckpointError(InputError):
    """A model folder, one of its files or one of its tensors is invalid."""


class CalibrationError(InputError):
    """A calibration file or record is invalid."""


class OutputError(InputError):
    """The output folder cannot be used."""


class ClusterError(MergeError):
    """The cluster cannot run the merge (exit code 3)."""

    exit_code = 3


class GpuMemoryError(ClusterError):
    """A GPU ran out of memory. The driver adds the remedy, which depends on the other settings of the merge."""


class RunError(MergeError):
    """The run failed (exit code 4)."""


class StorageError(RunError):
    """An operation of a disk or of object storage failed; earlier files are unchanged."""


class DamagedError(StorageError):
    """A file of a run's state is not as it was written."""
