"""A submitted job on a real head with its dashboard, as a cluster's user runs it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """The dashboard's address of a head of our own, and the environment in which it answers us."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    dashboard = free_port()
    # Ray's sockets live below this folder, and their paths may not be long.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder:
        arguments = ["start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
        arguments += ["--num-cpus=2", f"--object-store-memory={120 << 20}", f"--temp-dir={folder}"]
        with open(Path(folder) / "head.log", "wb") as log:
            process = subprocess.Popen([BIN / "ray", *arguments], env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            deadline = time.monotonic() + 90
            while not answers(address, environment):
                assert process.poll() is None, (Path(folder) / "head.log").read_text()
                assert time.monotonic() < deadline, "the head did not come up"
            yield address, environment
        finally:
            process.terminate()
            process.wait(60)


def answers(address: str, environment: dict[str, str]) -> bool:
    listed = subprocess.run([BIN / "ray", "job", "list", "--address", address], env=environment, capture_output=True)
    return listed.returncode == 0


def submit(head: tuple[str, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ROOT, "--", "python", "cli.py"]
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_submitted_job_merges_into_a_shared_folder(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge")
    done = submit(head, "merge", str(config), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 2 3/3" in done.stdout
    assert f"merged 2 experts into {tmp_path / 'out'}" in done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_job_with_wrong_input_ends_with_our_message_and_code(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    config = tiny.make_merge(tmp_path / "merge")
    done = submit(head, "merge", str(config), "--out", str(tmp_path / "out"), "--set", "parameters.weigth=1")
    assert done.returncode != 0
    assert "did you mean 'weight'?" in done.stdout
    assert "exit code 2" in done.stdout or "exited with code 2" in done.stdout
    assert not (tmp_path / "out").exists()
