"""A Ray head started with `ray start --head`, with its own ports, temporary folder and authentication token."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: Host and port of the GCS.
        dashboard: URL of the dashboard, to which jobs are submitted.
        metrics: URL of the metrics that Prometheus scrapes.
        environment: Environment for commands that connect to it; holds the token.
        pid: Process id of `ray start`, of which every process of the head is a descendant.
    """

    address: str
    dashboard: str
    metrics: str
    environment: dict[str, str]
    pid: int


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """The environment of this process without the address of a cluster, offline, with this Python first in PATH."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PATH": f"{BIN}{os.pathsep}{environment['PATH']}", "HF_HUB_OFFLINE": "1"}
    # On a busy machine, threads that wait actively delay a step of a tiny model by seconds.
    return environment | {"OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def started_head() -> Iterator[Head]:
    environment = clean_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    port, dashboard, metrics = free_port(), free_port(), free_port()
    urls = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}"
    # Ray's sockets are created below this folder, and a socket's path is limited to 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder:
        arguments = ["start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
        arguments += [f"--metrics-export-port={metrics}", f"--temp-dir={folder}"]
        arguments += [
            f"--dashboard-agent-listen-port={free_port()}",
            "--num-cpus=2",
            f"--object-store-memory={120 << 20}",
        ]
        log = Path(folder) / "head.log"
        with open(log, "wb") as opened:
            process = subprocess.Popen([BIN / "ray", *arguments], env=environment, stdout=opened, stderr=opened)
        head = Head(*urls, environment, process.pid)
        try:
            deadline = time.monotonic() + 90
            while not answers(head):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "the head did not come up"
            yield head
        finally:
            process.terminate()
            process.wait(60)


def answers(head: Head) -> bool:
    listed = [BIN / "ray", "job", "list", "--address", head.dashboard]
    return subprocess.run(listed, env=head.environment, capture_output=True, check=False).returncode == 0
