"""The shards of a merge in processes of this machine: the same classes as on Ray, without the seconds that Ray takes.

A shard is a fork of this process, which has imported what a shard needs. It is made before this process has computed
with more than one thread, and uses neither the threads of this process nor object storage. A shard that ends
unexpectedly is a loss: all shards are started again, and the run goes on from its stored state.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from actors.shard import Shard
from cluster.seats import Node, Seating
from cluster.watch import Lost, Watch
from engine.bounded_process import PR_SET_PDEATHSIG
from engine.errors import MergeError, RunError
from engine.machine import usable_cpus, usable_memory
from engine.planning.plan import Plan
from engine.storage.folder import Folder

# Seconds in which a killed process ends, unless it waits for a disk that does not answer.
ENDING = 5.0
# Options of glibc's mallopt(3), and the values that actors on Ray have; see `cluster.session.ENVIRONMENT`.
MALLOC = {-3: 4 << 20, -1: 128 << 20}


class Died(Lost):
    """The process of a shard has ended without an answer."""

    do = (
        "free memory, or use a machine with more; then run the same command to resume, with --debug to see what the "
        "process prints at its end"
    )


class OneMachine:
    """This machine as the `Hosts` of shards. `debug`: show the output of the shards."""

    def __init__(self, debug: bool = False) -> None:
        self._debug = debug

    def nodes(self) -> list[Node]:
        """Return this machine as a node without GPUs, which shards of a merge without learning do not use."""
        return [Node(usable_cpus(), 0, usable_memory(), os.uname().nodename)]

    def watch(self, say: Callable[[str], None]) -> Watch:
        """Return a watch of processes."""
        return ProcessWatch(say)

    def crew(self, plan: Plan, state: Folder, layout: Seating, watch: Watch) -> ProcessCrew:
        """Return a context with a shard for each seat."""
        names = [f"shard {index}" for index in range(len(layout.shards))]

        def make(index: int) -> Callable[[], Shard]:
            return lambda: Shard(plan, index, state)

        return ProcessCrew([ShardProcess(name, make(index), self._debug) for index, name in enumerate(names)], watch)


class ProcessCrew:
    """The shards of one merge, started with the context and ended with it."""

    def __init__(self, shards: Sequence[ShardProcess], watch: Watch) -> None:
        self.shards, self._watch = shards, watch

    def __enter__(self) -> ProcessCrew:
        for shard in self.shards:
            shard.start()
            self._watch.on(shard, "", shard.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self.shards:
            self._watch.gone(shard)
            shard.end()


class _Call:
    """A call of a method in a shard's process, as a reference to its result.

    Attributes:
        shard: The shard.
        done: Whether there is a result.
        failed: Whether the result is an error.
        value: What the method returned.
        error: What it raised, as text if it is none of this project's errors; None if the process died.
    """

    def __init__(self, shard: ShardProcess) -> None:
        self.shard, self.done, self.failed = shard, False, False
        self.value: Any = None
        self.error: MergeError | str | None = None


class _Method:
    """A method of a shard in another process, called as a method of an actor of Ray is: by `remote`."""

    def __init__(self, shard: ShardProcess, name: str) -> None:
        self._shard, self._name = shard, name

    def remote(self, *arguments: Any) -> _Call:
        """Send the call to the shard's process."""
        return self._shard.send(self._name, arguments)


class ShardProcess:
    """A shard in a forked process. Each method of `Shard` is an attribute with `remote`, which returns a reference.

    The process answers the calls one after the other, in their order.

    Args:
        name: For messages.
        make: Makes the shard, in the process.
        debug: Leave the output of the process where that of this process goes.
    """

    def __init__(self, name: str, make: Callable[[], Shard], debug: bool) -> None:
        self.name, self._make, self._debug = name, make, debug
        self._calls: deque[_Call] = deque()

    def __getattr__(self, method: str) -> _Method:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self, method)

    def start(self) -> None:
        """Fork the process."""
        # Here: a pipe that is open when another shard is forked would not close when this shard ends.
        self.connection, theirs = multiprocessing.Pipe()
        arguments = (self._make, theirs, self.connection, os.getpid(), self._debug)
        self._process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings():
            # From Python 3.12 on, about the threads of this process, none of which the shard uses.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def end(self) -> None:
        """Kill the process, as Ray kills an actor; what it has half written has a temporary name."""
        self.connection.close()
        self._process.kill()
        self._process.join(ENDING)

    def send(self, method: str, arguments: tuple[Any, ...]) -> _Call:
        """Send a call and return the reference to its result."""
        call = _Call(self)
        self._calls.append(call)
        with suppress(ConnectionError):  # a process that has ended is found when its answer is awaited
            self.connection.send((method, arguments))
        return call

    def receive(self) -> None:
        """Receive an answer, which must be there, or find that the process has ended."""
        try:
            failed, value = self.connection.recv()
        except (EOFError, ConnectionError):
            while self._calls:
                call = self._calls.popleft()
                call.done = call.failed = True
            return
        call = self._calls.popleft()
        call.done, call.failed = True, failed
        call.value, call.error = (None, value) if failed else (value, None)

    @property
    def is_silent(self) -> bool:
        """Whether the process owes an answer."""
        return bool(self._calls)

    def fate(self) -> str:
        """Return how the process ended, for a message."""
        self._process.join(ENDING)
        code = self._process.exitcode or 0
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class ProcessWatch(Watch):
    """The watch of shards in processes of this machine."""

    def _ready(self, references: Sequence[_Call], timeout: float) -> list[_Call]:
        if not any(call.done for call in references):
            awaited = {call.shard.connection: call.shard for call in references}
            for connection in wait(list(awaited), timeout):
                assert isinstance(connection, Connection)
                awaited[connection].receive()
        return [call for call in references if call.done][:1]

    def _value(self, reference: _Call, what: str) -> Any:
        if not reference.failed:
            return reference.value
        if isinstance(reference.error, MergeError):
            raise reference.error
        if reference.error is not None:
            raise RunError(f"an actor failed while {what}: {reference.error}", do="run with --debug to see where")
        raise Died(f"{reference.shard.name} {reference.shard.fate()} while {what}")

    def _look(self) -> None:
        """Do nothing: the machine is this one, and the end of a process is found when its answer is awaited."""

    def _unresponsive(self) -> list[str]:
        return [name for shard, (_, name) in self._actors.items() if shard.is_silent]


def _serve(make: Callable[[], Shard], connection: Connection, theirs: Connection, parent: int, debug: bool) -> None:
    """Make the shard, and answer calls of its methods until the parent closes the connection or ends."""
    theirs.close()
    _isolate(parent, debug)
    shard = make()
    # A shard computes in threads of its own. The pool of this thread, which a fork does not copy, must not be used.
    torch.set_num_threads(1)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = False, getattr(shard, method)(*arguments)
        except Exception as error:  # noqa: BLE001 - raised in the driver, as Ray does
            if debug:
                traceback.print_exc()
            answer = True, error if isinstance(error, MergeError) else f"{type(error).__name__}: {error}"
        connection.send(answer)


def _isolate(parent: int, debug: bool) -> None:
    """End this process with its parent, and reset what it has of it: handlers of signals, output, settings."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    with suppress(OSError):
        # Where memory lacks, the kernel ends this process rather than its parent, which reports it.
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    gc.freeze()  # the parent's objects are neither visited nor copied
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this process
    for option, value in MALLOC.items():
        libc.mallopt(option, value)
    if not debug:
        faulthandler.disable()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
