"""Start of the server in `warm/server.py`, which makes a process of a merge start in milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "warm"


@contextmanager
def warm_server(engine: bool = True) -> Iterator[dict[str, str]]:
    """Start a server, and yield the environment variables by which Ray workers and `cli.py` find it.

    A forked process is a descendant of this process, not of its raylet, see `processes.descendants`.

    Args:
        engine: Fork with the engine of this checkout imported and its kernels compiled. Otherwise only libraries are
            imported, and each process imports its engine from wherever a job brought it.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        command = [sys.executable, FOLDER / "server.py", address, "engine" if engine else "libraries"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
            yield {"WARM_SERVER": address, "PYTHONPATH": path}
            server.communicate()
