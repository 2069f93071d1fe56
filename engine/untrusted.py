"""Bounded reading of untrusted input: regular files of limited size, strict JSON, and limits on CPU time and memory.

Input files may come from anywhere. No input may hang a run, exhaust the memory, or have two readings.
"""

from __future__ import annotations

import json
import resource
import signal
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import InputError

# Maximum bytes of a JSON file and of a tokenizer.json. The index of 100,000 tensors has 10 MB; vocabularies are larger.
JSON_BYTES, TOKENIZER_BYTES = 32 << 20, 128 << 20

# Maximum number of lists and mappings in one JSON text, and of levels of nesting.
CONTAINERS, DEPTH = 4_000_000, 100

# Maximum characters of a value quoted in a message.
SHOWN = 80
# Names that a message lists.
LISTED = 3

# Limits of `cpu_limit`, in CPU seconds so that the load of the machine does not matter, and of `memory_limit`, in bytes
# of address space beyond the current use.
SECONDS, MEMORY = 3, 512 << 20

# Exceptions that libraries raise for input they cannot handle.
FAULTS: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def check_regular(path: Path, limit: int | None, error_type: type[InputError], what: str = "the file") -> None:
    """Check that a path is a regular file of at most `limit` bytes (None: any size).

    Opening a pipe could block for ever, and a device may have no end.

    Args:
        path: The file.
        limit: Maximum bytes.
        error_type: The class of the error to raise.
        what: The file's description in the message.

    Raises:
        InputError: (`error_type`) the file is missing, not regular, or larger.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(what, path, error, error_type) from error
    if not stat.S_ISREG(status.st_mode):
        fault = "Is a directory" if stat.S_ISDIR(status.st_mode) else "it is a pipe or a device"
        raise error_type(f"{what} cannot be read: {fault}", str(path), "a regular file")
    if limit is not None and status.st_size > limit:
        raise error_type(f"{what} has {status.st_size:,} bytes", str(path), f"at most {limit:,} bytes")


@contextmanager
def open_regular(
    path: Path, limit: int | None, error_type: type[InputError], what: str = "the file"
) -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes. For the arguments see `check_regular`.

    Raises:
        InputError: (`error_type`) `check_regular` refuses the file, or it cannot be read.
    """
    check_regular(path, limit, error_type, what)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(what, path, error, error_type) from error


def read_text(path: Path, limit: int, error_type: type[InputError], what: str = "the file") -> str:
    """Return the text of a regular file in UTF-8. For the arguments see `check_regular`.

    Raises:
        InputError: (`error_type`) the file cannot be read, is larger than `limit`, or is not UTF-8.
    """
    with open_regular(path, limit, error_type, what) as file:
        content = file.read(limit + 1)
    try:
        return content[:limit].decode("utf-8")
    except UnicodeDecodeError as error:
        raise error_type(f"{what} is not UTF-8 text", str(path)) from error


def parse_json(text: str, where: str, error_type: type[InputError]) -> Any:
    """Return the value of a JSON text; `where` names its source in messages.

    Raises:
        InputError: (`error_type`) the text is not valid JSON, repeats a key, contains half of a surrogate pair, has
            more than CONTAINERS lists and mappings, or is nested deeper than DEPTH.
    """
    containers = text.count("{") + text.count("[")
    if containers > CONTAINERS:
        raise error_type(f"not valid JSON: {containers:,} lists and mappings", where, f"at most {CONTAINERS:,}")
    try:
        value = json.loads(text, object_pairs_hook=_mapping)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair parses, but could not be written to any file.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise error_type(f"not valid JSON: {error}", where) from error
    level = [value]
    for _ in range(DEPTH if containers > DEPTH else 0):
        parts = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in parts if isinstance(part, dict | list)]
    if containers > DEPTH and level:
        raise error_type("not valid JSON: it is nested too deeply", where, f"at most {DEPTH} levels")
    return value


def shown(text: str, most: int = SHOWN) -> str:
    """Return the text for quotation in a message: on one line, cut to `most` characters."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(texts: Sequence[str], separator: str = ", ") -> str:
    """Return the first LISTED texts for a message, and the number of the others."""
    more = len(texts) - LISTED
    return separator.join(texts[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


@contextmanager
def library_errors_as(fault: Callable[[str], InputError], *more: type[Exception]) -> Iterator[None]:
    """Convert exceptions that library code raises for input it cannot handle.

    Args:
        fault: Makes the error to raise from the exception's message.
        more: Further exception classes of the library, besides FAULTS.
    """
    faults = FAULTS + more
    try:
        yield
    except faults as error:
        raise fault(_message(error)) from error
    except BaseException as error:
        # Extensions written in Rust raise bare Exception, and PanicException, which is a BaseException.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise fault(_message(error)) from error


@contextmanager
def cpu_limit(fault: InputError, seconds: float | None = None) -> Iterator[None]:
    """Raise `fault` if the block takes more than `seconds` of CPU time (None: SECONDS).

    Effective in the main thread only, where Python handles signals; commands run their checks there. In other threads
    the block runs without a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise fault

    before = signal.signal(signal.SIGVTALRM, stop)
    # Repeated every second, because library code may swallow the first exception.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS if seconds is None else seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory_limit(fault: InputError, limit: int = MEMORY) -> Iterator[None]:
    """Raise `fault` if the block allocates more than `limit` bytes of address space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + limit
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    except MemoryError as error:
        raise fault from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(repr(twice))} is given twice")
    return mapping


def _message(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__, 4 * SHOWN)


def _unreadable(what: str, path: Path, error: OSError | ValueError, error_type: type[InputError]) -> InputError:
    return error_type(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}", str(path))
