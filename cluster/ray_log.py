"""What Ray prints, in a file instead of on the terminal: lines of its own code, and the output of the actors."""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import select
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray._private import worker

# Bytes of the file at most; then it becomes FILE.1, and an earlier FILE.1 is lost.
MOST_BYTES = 2 << 20
# Lines that Ray's own code prints on the error output of this process: its log, and what it prints when it fails.
RAYS = re.compile(rb"\[\d{4}-\d\d-\d\d [^\]]*\]|\*\*\* |    @ |[EFIW]\d{4} \d\d:\d\d:|\((raylet|gcs_server|autoscaler)")
_STDERR, _POLL_SECONDS = 2, 0.2


@contextmanager
def ray_log(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Append what Ray and the actors print to the file at `path`, as long as the context lasts.

    `ray.init` is to be called in the context, with `log_to_driver`. Lines that others print on the error output of this
    process are given to `say`. If the file cannot be written, its lines are lost.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    file, log, printed = _File(path), logging.getLogger("ray"), worker.print_to_stdstream
    handlers, log.handlers = log.handlers, [file]
    # Not part of Ray's public interface. Ray calls it with the output of actors, and with errors of its own processes.
    worker.print_to_stdstream = lambda data, ignore_prefix: file.output(data)

    def write(line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if RAYS.match(line):
            file.line(text)
        elif text:
            say(text)

    try:
        with _error_lines(write):
            yield
    finally:
        worker.print_to_stdstream, log.handlers = printed, handlers
        file.close()


class _File(logging.handlers.RotatingFileHandler):
    """The file of the log, made at its first line; also the handler of Ray's logger."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=MOST_BYTES, backupCount=1, delay=True)
        self._plain = logging.Formatter("%(asctime)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return self._plain.format(record)  # ray.init sets another

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing, such as on a full disk."""

    def line(self, text: str) -> None:
        """Append a line."""
        self.handle(logging.LogRecord("ray", logging.INFO, "", 0, text, (), None))

    def output(self, data: Mapping[str, Any]) -> None:
        """Append lines of an actor, or of a process of Ray, as Ray delivers them; but the reports of its autoscaler."""
        if data.get("pid") == "autoscaler":
            return
        source = data.get("actor_name") or data.get("task_name") or "process"
        where = f" on {data['ip']}" if data.get("ip") else ""
        for text in data["lines"]:
            self.line(f"{source} {data.get('pid')}{where}: {text}")


@contextmanager
def _error_lines(write: Callable[[bytes], None]) -> Iterator[None]:
    """Call `write` with each line that this process prints on its error output, in a thread, as long as it lasts."""
    before = os.dup(_STDERR)
    reading, writing = os.pipe()
    os.dup2(writing, _STDERR)
    os.close(writing)
    ended = threading.Event()

    def read() -> None:
        rest = b""
        while True:
            # Processes that have inherited the output may keep the pipe open for longer than this one does.
            over = ended.is_set()
            if not select.select([reading], [], [], 0 if over else _POLL_SECONDS)[0]:
                if over:
                    break
                continue
            data = os.read(reading, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                write(line)
        if rest:
            write(rest)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(before, _STDERR)
        os.close(before)
        ended.set()
        thread.join()
        os.close(reading)
