"""A child process with limits on CPU time and memory, for libraries that read files from outside.

Native code cannot be stopped from within its process: a tokenizer's regular expression may never end, and where memory
lacks, the process is aborted. In a child, either ends the child alone. Nothing that a child sends is unpickled: an
answer is JSON and bytes.

The child is a fork, which takes 50 ms with torch loaded; a new process would import torch and transformers for 5 to 10
seconds. Other threads of this process do not exist in the child. It is single-threaded, and uses nothing of theirs:
neither Ray, nor CUDA, nor object storage.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from engine import errors
from engine.errors import InputError
from engine.untrusted import shown

# Limits of the work for one answer: CPU seconds, and seconds without an answer; and of a child: bytes of memory beyond
# those of its parent, and bytes of a file that it writes. Measured: a tokenizer of 262,000 tokens loads in 3 s with
# 0.4 GB, and encodes 2 MB in 4 s. A processor may need gigabytes for an image of 50 megapixels.
SECONDS, SILENCE, MEMORY, FILE_BYTES = 60, 600, 4 << 30, 64 << 20
LIMITS = f"at most {SECONDS} CPU seconds and {MEMORY >> 30} GiB of memory"

# What native code prints before it aborts its process because memory lacks: Rust, C++.
NO_MEMORY = ("memory allocation of ", "bad_alloc")

# Maximum bytes of the JSON of an answer.
ANSWER = 256 << 20

# The signal for a process whose parent ends, see prctl(2).
PR_SET_PDEATHSIG = 1

# Makes the error to raise when a child fails, from a text such as "takes too long".
Fault = Callable[[str], InputError]


class BoundedProcess:
    """An object in a child process with limits, whose methods are called from here.

    Args:
        make: Makes the object, in the child. Each of its methods that is called returns a value for JSON, and bytes.
        fault: Makes the error if the child exceeds its limits, or crashes.
        seconds: Limit of the CPU time for one answer.
        memory: Limit of the memory, in bytes.

    Raises:
        InputError: `make` raised it, or `fault` made it.
    """

    def __init__(
        self, make: Callable[[], Any], fault: Fault, seconds: int | None = None, memory: int | None = None
    ) -> None:
        self._seconds, self._memory = seconds or SECONDS, memory or MEMORY
        self._too_large = f"takes more than {self._memory / 2**30:g} GiB of memory"
        self._output = open(os.memfd_create("output"), "r+b", buffering=0)  # noqa: SIM115 - closed in `close`
        self._connection, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        limits = self._seconds, self._memory
        arguments = (make, theirs, self._connection, self._output, limits)
        self._process = fork.Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings():
            # From Python 3.12 on, about the threads of this process. See the module's docstring.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()
        try:
            self._answer(fault)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any, fault: Fault) -> tuple[Any, bytes]:
        """Call a method of the object, and return its value and its bytes.

        Raises:
            InputError: The method raised it, or `fault` made it. After the latter, the child has ended.
        """
        with suppress(ConnectionError):  # if the child has ended, `_answer` says how
            self._connection.send((method, arguments))
        return self._answer(fault)

    def close(self) -> None:
        """End the child."""
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()
        self._output.close()

    def __enter__(self) -> BoundedProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _answer(self, fault: Fault) -> tuple[Any, bytes]:
        try:
            if not self._connection.poll(SILENCE):
                self._process.kill()
                raise fault(f"gives no answer for {SILENCE} seconds")
            answer = json.loads(self._connection.recv_bytes(ANSWER))
            content = self._connection.recv_bytes()
        except (EOFError, ConnectionError) as error:
            raise self._died(fault) from error
        except OSError as error:
            raise fault(f"answers with more than {ANSWER:,} bytes") from error
        if answer.get("memory"):
            raise fault(self._too_large)
        if "error" in answer:
            kind: type[InputError] = getattr(errors, answer["error"][0])
            raise kind(*answer["error"][1:])
        return answer["value"], content

    def _died(self, fault: Fault) -> Exception:
        self._process.join()
        code = self._process.exitcode or 0
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 20_000))
        output = self._output.read().decode(errors="replace").strip()
        if code >= 0:
            return RuntimeError(f"a child process ended with code {code}\n{output}")
        if -code == signal.SIGPROF:
            return fault(f"takes more than {self._seconds} CPU seconds")
        if any(sign in output for sign in NO_MEMORY):
            return fault(self._too_large)
        last = f": {shown(output.splitlines()[-1])}" if output else ""
        return fault(f"ends its process with {signal.Signals(-code).name}{last}")


def bounded(work: Callable[[], Any], fault: Fault, seconds: int | None = None, memory: int | None = None) -> Any:
    """Return a function's value, a value for JSON, computed in a child process with limits; see `BoundedProcess`.

    Raises:
        InputError: The function raised it, or `fault` made it because the child exceeded its limits or crashed.
    """
    with BoundedProcess(lambda: _Function(work), fault, seconds, memory) as process:
        return process.call("value", fault=fault)[0]


class _Function:
    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work

    def value(self) -> tuple[Any, bytes]:
        return self._work(), b""


def _serve(
    make: Callable[[], Any], connection: Connection, theirs: Connection, output: Any, limits: tuple[int, int]
) -> None:
    """Make the object, and answer calls of its methods until the parent closes the connection or ends."""
    theirs.close()
    seconds, memory = limits
    _isolate(output.fileno(), memory)
    made: list[Any] = []

    def start() -> tuple[Any, bytes]:
        made.append(make())
        return None, b""

    _reply(connection, seconds, start)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        _reply(connection, seconds, partial(getattr(made[0], method), *arguments))


def _reply(connection: Connection, seconds: int, work: Callable[[], tuple[Any, bytes]]) -> None:
    """Do the work for an answer within the limit of CPU time, whose signal ends this process, and send the answer."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    content = b""
    try:
        value, content = work()
        answer = json.dumps({"value": value}).encode()
    except InputError as error:
        answer = json.dumps({"error": [type(error).__name__, *error.args]}).encode()
    except MemoryError:
        answer = b'{"memory": true}'
    connection.send_bytes(answer)
    connection.send_bytes(content)


def _isolate(output: int, memory: int) -> None:
    """Set the limits of this process, and reset what it has of its parent: handlers of signals, output."""
    # Else a busy child would hold the locks of a killed parent.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()  # the parent's objects are neither visited nor copied
    faulthandler.disable()
    for number in (signal.SIGTERM, signal.SIGPROF, signal.SIGVTALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends the child
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = open(2, "w", errors="replace", closefd=False)  # noqa: SIM115
    # Threads would reserve address space, and those that a library has started before are not in this process.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RUST_BACKTRACE="0")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {resource.RLIMIT_AS: now + memory, resource.RLIMIT_FSIZE: FILE_BYTES, resource.RLIMIT_CORE: 0}
    for what, most in limits.items():
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
