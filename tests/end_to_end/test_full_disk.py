"""A full disk: exit code 4, a clear message, and a state from which the run resumes; a small one: exit code 3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from cluster_helpers import result
from errors import refused

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

# Merge to a disk in a new mount namespace (no root needed) that shrinks to size $1 once the merge has checked its room,
# which is when the devices are stored; then enlarge it and run the same command again.
SCRIPT = """
set -u
mount -t tmpfs -o size=50m tmpfs "$DISK" || exit 99
shrink() {
    for _ in $(seq 4000); do
        ls "$DISK"/out.run/devices.* && exec mount -o remount,size="$1" "$DISK"
        sleep 0.05
    done
}
shrink "$1" > /dev/null 2>&1 &
"$PYTHON" "$CLI" merge "$CONFIG" --out "$DISK/out"
echo "exit $?; there: $(ls "$DISK")"
find "$DISK/out.run" -name '*.part' | sed 's/^/left over: /'
mount -o remount,size=50m "$DISK" || exit 99
"$PYTHON" "$CLI" merge "$CONFIG" --out "$DISK/out"
echo "exit $?; there: $(ls "$DISK")"
cp -r "$DISK/out" "$SAVED"
"""

# Merge to a disk of size $1.
SMALL = """
mount -t tmpfs -o size="$1" tmpfs "$DISK" || exit 99
"$PYTHON" "$CLI" merge "$CONFIG" --out "$DISK/out"
echo "exit $?; there: $(ls -A "$DISK")"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_merge(tmp_path_factory.mktemp("merge"), cluster={"shards": 1})


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    subprocess.run([sys.executable, ROOT / "cli.py", "merge", config, "--out", out], check=True, capture_output=True)
    return result(out)


def on_a_disk(script: str, size: str, config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    disk = folder / "disk"
    disk.mkdir()
    environment = {**os.environ, "DISK": str(disk), "CONFIG": str(config), "SAVED": str(folder / "saved")}
    environment |= {"PYTHON": sys.executable, "CLI": str(ROOT / "cli.py")}
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", script, "bash", size]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_disk_without_room_is_refused_before_the_merge_begins(config: Path, tmp_path: Path) -> None:
    done = on_a_disk(SMALL, "80k", config, tmp_path)
    assert done.stdout.rstrip().endswith("exit 3; there:"), done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert str(tmp_path / "disk" / "out") in done.stderr and "--out" in done.stderr and "are free" in done.stderr


@pytest.mark.parametrize(
    ("size", "reached"),
    [
        pytest.param("84k", "targets", id="while targets are stored"),
        pytest.param("200k", "stage 2", id="in the output", marks=pytest.mark.thorough),
    ],
)
def test_a_full_disk_ends_the_run_and_its_state_is_whole(
    config: Path, undisturbed: dict[str, bytes], size: str, reached: str, tmp_path: Path
) -> None:
    done = on_a_disk(SCRIPT, size, config, tmp_path)
    first, _, second = done.stdout.partition("exit 4; there: out.run\n")
    assert second, done.stdout + done.stderr
    assert f"] {reached}" in first
    assert ("stage 2 3/3" in first) == (reached == "stage 2")
    assert "left over" not in done.stdout, "no partial file is left"
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr and "same command" in done.stderr
    assert "done before)" in second or reached == "targets"
    assert second.rstrip().endswith("exit 0; there: out")
    assert result(tmp_path / "saved") == undisturbed


def test_a_full_disk_below_the_object_store_is_reported() -> None:
    import ray

    from cluster.ray_watch import RayWatch
    from engine.errors import RunError

    system = {"local_fs_capacity_threshold": 0.0}
    options = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False, "logging_level": "critical"}
    ray.init(address="local", object_store_memory=80 << 20, _system_config=system, **options)
    try:
        filled = ray.remote(lambda: np.ones(30 << 20, np.uint8)).options(max_retries=0)
        watch = RayWatch(print)
        kept = [watch.answer(filled.remote(), "storing") for _ in range(2)]
        with refused(RunError, do="--object-spilling-directory", facts=["storing", "spills"]):
            watch.answer(filled.remote(), "storing")
        assert all(array.sum() == 30 << 20 for array in kept)
    finally:
        ray.shutdown()
