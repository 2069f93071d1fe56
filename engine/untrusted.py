"""What others made, read within bounds: regular files of a bounded size, JSON, and work of a bounded time and memory.

A file may come from anywhere: no input may hang a run, fill the memory, or mean something else than what it says. Knows
nothing of what is read.
"""

from __future__ import annotations

import json
import resource
import signal
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import InputError

# A file of JSON; 100,000 tensors have an index of 10 MB. Vocabularies are larger.
JSON_BYTES, TOKENIZER_BYTES = 32 << 20, 128 << 20


# Lists and mappings of one JSON text, and how deep they may stand in each other.
CONTAINERS, DEPTH = 4_000_000, 100


# Characters of a value in a message.
SHOWN = 80


# Of the processor, so that a busy machine changes nothing; memory beyond what the process has.
SECONDS, MEMORY = 3, 512 << 20


# What other people's code raises over input that it cannot take.
FAULTS: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def check_regular(path: Path, limit: int | None, error_type: type[InputError], what: str = "the file") -> None:
    """Refuse what is no regular file of at most `limit` bytes: a pipe would wait for ever, a device never end.

    Raises:
        InputError: of that kind.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(what, path, error, error_type) from error
    if not stat.S_ISREG(status.st_mode):
        fault = "Is a directory" if stat.S_ISDIR(status.st_mode) else "it is a pipe or a device"
        raise error_type(f"{what} cannot be read: {fault}", str(path), "a regular file")
    if limit is not None and status.st_size > limit:
        raise error_type(f"{what} has {status.st_size:,} bytes", str(path), f"at most {limit:,}")


@contextmanager
def open_regular(
    path: Path, limit: int | None, error_type: type[InputError], what: str = "the file"
) -> Iterator[BinaryIO]:
    """A regular file, for its bytes.

    Raises:
        InputError: see `check_regular`, or it cannot be read.
    """
    check_regular(path, limit, error_type, what)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(what, path, error, error_type) from error


def read_text(path: Path, limit: int, error_type: type[InputError], what: str = "the file") -> str:
    """The UTF-8 text of a regular file.

    Raises:
        InputError: see `open_regular`, or it is no such text.
    """
    with open_regular(path, limit, error_type, what) as file:
        content = file.read(limit + 1)
    try:
        return content[:limit].decode("utf-8")
    except UnicodeDecodeError as error:
        raise error_type(f"{what} is not UTF-8 text", str(path)) from error


def parse_json(text: str, where: str, error_type: type[InputError]) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: it is none, a key is given twice, a text in it is no Unicode, or it is nested too deeply or in too
        many parts.
    """
    containers = text.count("{") + text.count("[")
    if containers > CONTAINERS:
        raise error_type(f"not valid JSON: {containers:,} lists and mappings", where, f"at most {CONTAINERS:,}")
    try:
        value = json.loads(text, object_pairs_hook=_mapping)
        if "\\ud" in text or "\\uD" in text:
            # Half of a character, which no file could be written with.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise error_type(f"not valid JSON: {error}", where) from error
    level = [value]
    for _ in range(DEPTH if containers > DEPTH else 0):
        parts = (part for one in level for part in (one.values() if isinstance(one, dict) else one))
        level = [part for part in parts if isinstance(part, dict | list)]
    if containers > DEPTH and level:
        raise error_type("not valid JSON: it is nested too deeply", where, f"at most {DEPTH} levels")
    return value


def shown(text: str, most: int = SHOWN) -> str:
    """A text as a message shows it: on one line, and no more of it than helps."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def library_errors_as(fault: Callable[[str], InputError], *more: type[Exception]) -> Iterator[None]:
    """Raise `fault` of what other people's code within raises over input that it cannot take.

    `more`: exceptions of its own.
    """
    faults = FAULTS + more
    try:
        yield
    except faults as error:
        raise fault(_told(error)) from error
    except BaseException as error:
        # What is written in Rust raises nothing more special than these.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise fault(_told(error)) from error


@contextmanager
def cpu_limit(fault: InputError) -> Iterator[None]:
    """Raise `fault` where the work within takes longer than SECONDS of the processor.

    Only in the main thread, since Python tells no other one of a signal: it is where a command does its checks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise fault

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again every second, should the first be swallowed on its way.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory_limit(fault: InputError) -> Iterator[None]:
    """Raise `fault` where the work within takes more than MEMORY."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
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


def _told(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__, 4 * SHOWN)


def _unreadable(what: str, path: Path, error: OSError | ValueError, error_type: type[InputError]) -> InputError:
    return error_type(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}", str(path))
