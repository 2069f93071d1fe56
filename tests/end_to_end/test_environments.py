"""Odd environments: a working directory that is gone, a user without a name, small shared memory, ASCII streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli

# In new user and mount namespaces, which needs no root: a user without a name, and 8 MB of shared memory.
COMMAND = ["unshare", "--user", "--map-user=12345", "--map-group=12345", "--keep-caps", "--mount", "bash", "-c"]
COMMAND += ['mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"', "bash"]


def test_a_working_directory_that_is_gone_is_reported(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in ("plan", "merge", "evaluate", "report"):
        done = CliRunner().invoke(cli.main, [command, str(llama_merge)])
        assert done.exit_code == 2 and done.output.count("error: ") == 1, done.output
        assert "directory" in done.output.splitlines()[0]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_merge_by_a_user_without_a_name_and_with_little_shared_memory(llama_merge: Path, tmp_path: Path) -> None:
    """Also with ASCII streams, in the C locale, and with Python's assertions off."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"HOME": str(tmp_path), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    merge = [sys.executable, "-O", cli.__file__, "merge", llama_merge, "--set", "models.0.name=größe"]
    done = subprocess.run(
        [*COMMAND, *merge, "--out", tmp_path / "mergé"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"/dev/shm" in done.stdout and b"Traceback" not in done.stderr
    assert b"stage 2 3/3" in done.stdout
    assert (tmp_path / "mergé" / "model.safetensors").is_file() and not (tmp_path / "mergé.run").exists()
