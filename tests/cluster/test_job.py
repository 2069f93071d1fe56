"""Jobs submitted to a real head through its dashboard: exit codes, logs, stops and authentication tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from cluster_helpers import result, stopped
from processes import descendants, kill, titled
from ray_head import BIN, ROOT, Head, started_head
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


@dataclass(frozen=True)
class Told:
    """The status, exit code and log of a job, as the cluster reports them."""

    status: str
    code: int | None
    log: str


@pytest.fixture(scope="module")
def head(warm_libraries: None) -> Iterator[Head]:
    with started_head() as head:
        yield head


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with a single stage, which takes long enough to be stopped."""
    options = {"merge_method": "expert_merging", "parameters": {"epochs": 45}}
    return tiny.make_merge(tmp_path_factory.mktemp("merge"), **options)


@pytest.fixture(scope="module")
def undisturbed(head: Head, config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """The output folder and the job of a merge that was not disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, run_job(head, config, "--out", out)


def start_job(head: Head, *arguments: object) -> str:
    """Submit `python cli.py merge ARGUMENTS` as a job and return its id."""
    submitted = submit(head.dashboard, head.environment, *arguments)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    name = re.search(r"raysubmit_\w+", submitted.stdout)
    assert name is not None
    return name[0]


def submit(dashboard: str, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", "--address", dashboard, "--working-dir", ROOT, "--no-wait", "--"]
    command += ["python", "cli.py", "merge", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def tell(head: Head, name: str) -> Told:
    """Ask Ray's REST API for jobs, whose Python client would import Ray in another process for each token."""
    info, log = _get(head, f"/api/jobs/{name}"), _get(head, f"/api/jobs/{name}/logs")
    return Told(info["status"], info["driver_exit_code"], log["logs"])


def _get(head: Head, path: str) -> Any:
    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(head.dashboard + path, headers=headers), timeout=60) as answer:
        return json.load(answer)


def wait_until(done: Callable[[Told], bool], head: Head, name: str) -> Told:
    deadline = time.monotonic() + 240
    while not done(told := tell(head, name)):
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
    return told


def ended(told: Told) -> bool:
    return told.status in ("SUCCEEDED", "FAILED", "STOPPED")


def run_job(head: Head, *arguments: object) -> Told:
    return wait_until(ended, head, start_job(head, *arguments))


def test_a_submitted_job_merges_into_a_shared_folder(undisturbed: tuple[Path, Told]) -> None:
    out, told = undisturbed
    assert (told.status, told.code) == ("SUCCEEDED", 0), told.log
    assert told.log.rstrip().endswith(str(out))
    AutoModelForCausalLM.from_pretrained(out)
    assert not out.with_name("out.run").exists()


def test_a_jobs_log_is_plain_lines_with_phases_and_losses(undisturbed: tuple[Path, Told]) -> None:
    log = undisturbed[1].log
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", log), "neither escape codes nor carriage returns"
    for phase in ("targets", "writing"):
        assert re.search(rf"^\[ *\d+\.\d s\] {phase}: \d+$", log, flags=re.MULTILINE), log
    steps = re.findall(
        r"^\[ *\d+\.\d s\] stage 1 (\d+)/120  kl \d\.\d{4}  hidden \d\.\d{4}  lr \S+  \d+\.\d s$", log, re.M
    )
    assert steps == [str(step) for step in range(1, 121)]


def test_wrong_input_is_2(head: Head, config: Path, tmp_path: Path) -> None:
    told = run_job(head, config, "--out", tmp_path / "out", "--set", "parameters.weigth=1")
    assert (told.status, told.code) == ("FAILED", 2), told.log
    assert "parameters.weigth" in told.log and "'weight'" in told.log
    assert not list(tmp_path.iterdir())


def test_what_the_cluster_does_not_have_is_3(head: Head, config: Path, tmp_path: Path) -> None:
    wanted = ["--set", "cluster.trainer.num_gpus=4", "--set", "cluster.wait=2"]
    told = run_job(head, config, "--out", tmp_path / "out", *wanted)
    assert (told.status, told.code) == ("FAILED", 3), told.log
    assert "GPUs" in told.log and "cluster" in told.log
    assert not list(tmp_path.iterdir())


def test_a_trainer_that_always_dies_is_4_and_leaves_a_state(
    head: Head, config: Path, undisturbed: tuple[Path, Told], tmp_path: Path
) -> None:
    name = start_job(head, config, "--out", tmp_path / "out")
    wait_until(lambda told: "stage 1 3/" in told.log or ended(told), head, name)

    def killed(told: Told) -> bool:
        kill(titled("ray::Trainer", descendants(head.pid)))
        return ended(told)

    told = wait_until(killed, head, name)
    assert (told.status, told.code) == ("FAILED", 4), told.log
    assert "\nerror: " in told.log and "Traceback" not in told.log
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").exists()


def test_a_stopped_job_goes_on_when_it_is_submitted_again(
    head: Head, config: Path, undisturbed: tuple[Path, Told], tmp_path: Path
) -> None:
    name = start_job(head, config, "--out", tmp_path / "out")
    under_way = wait_until(lambda told: "stage 1 3/" in told.log or ended(told), head, name)
    assert not ended(under_way), under_way.log
    stop = [BIN / "ray", "job", "stop", "--address", head.dashboard, name]
    subprocess.run(stop, env=head.environment, capture_output=True, timeout=60, check=True)
    told = wait_until(ended, head, name)
    # Ray does not record the exit code of a job that it stopped.
    assert (told.status, told.code) == ("STOPPED", None), told.log
    assert told.log.rstrip().splitlines()[-1].startswith("stopped")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run" / "stage-1.safetensors").exists()
    again = run_job(head, config, "--out", tmp_path / "out")
    assert again.code == 0, again.log
    assert re.search(r"stage 1: 120 \(\d+ done before\)", again.log) and "targets: 7 (7 done before)" in again.log
    assert result(tmp_path / "out") == result(undisturbed[0])


@pytest.mark.thorough
def test_a_driver_outside_of_a_job_that_is_terminated_is_130(
    head: Head, config: Path, undisturbed: tuple[Path, Told], tmp_path: Path
) -> None:
    command = [sys.executable, ROOT / "cli.py", "merge", config, "--out", tmp_path / "out", "--address", head.address]
    code, message = stopped(command, head.environment)
    assert code == 130, message
    assert message.rstrip().splitlines()[-1].startswith("stopped") and "Traceback" not in message
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    assert "done before" in again.stdout
    assert result(tmp_path / "out") == result(undisturbed[0])


@pytest.mark.parametrize("token", ["0" * 32, None], ids=["wrong", "missing"])
def test_without_the_clusters_token_nothing_is_submitted(
    head: Head, config: Path, tmp_path: Path, token: str | None
) -> None:
    environment = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_TOKEN"}
    # An empty home, because Ray also reads a token from the user's.
    environment |= {"HOME": str(tmp_path)} | ({"RAY_AUTH_TOKEN": token} if token else {})
    submitted = submit(head.dashboard, environment, config, "--out", tmp_path / "out")
    assert submitted.returncode != 0
    assert "AuthenticationError" in submitted.stderr
    assert not (tmp_path / "out").exists()


def test_a_driver_without_the_clusters_token_is_3_and_told_so(head: Head, config: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_TOKEN"}
    command = [sys.executable, ROOT / "cli.py", "merge", config, "--out", tmp_path / "out", "--address", head.address]
    options = {"env": environment | {"HOME": str(tmp_path)}, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command, **options, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert not list(tmp_path.glob("out*"))
