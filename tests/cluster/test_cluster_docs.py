"""The code blocks of docs/cluster.md: they are parsed, and run on clusters that are started on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import plan_of
from object_store import ENVIRONMENT, Store, serving
from processes import kill, marked, new_mark, send
from ray_head import BIN, ROOT, clean_environment, free_port
from transformers import AutoModelForCausalLM

import cli

PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
FOUND = re.findall(r"^<!-- test: (\w+)\. [^\n]*-->\n```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
BLOCKS = {name: text for name, _, text in FOUND}
SHELL = [name for name, language, _ in FOUND if language == "bash"]


def test_every_block_says_how_it_is_tested() -> None:
    assert len(BLOCKS) == len(FOUND) == PAGE.count("\n```\n")


@pytest.mark.parametrize("name", SHELL)
def test_shell_blocks_parse(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=BLOCKS[name], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_rayjob_is_one_of_kuberays() -> None:
    job = yaml.safe_load(BLOCKS["rayjob"])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"]["name"] and job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"].startswith("2.60.") and cluster["authOptions"] == {"mode": "token"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert all(isinstance(value, str) for value in head["rayStartParams"].values())
    assert workers and all(group["groupName"] and group["minReplicas"] > 0 for group in workers)
    for group in (head, *workers):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"] and container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_rayjobs_entrypoint_is_our_command_line() -> None:
    python, script, command, *arguments = shlex.split(yaml.safe_load(BLOCKS["rayjob"])["spec"]["entrypoint"])
    assert (python, command) == ("python", "merge")
    folder, _, name = script.rpartition("/")
    assert f"COPY . {folder}\n" in BLOCKS["image"] and (ROOT / name).is_file()
    given = cli.merge.make_context("merge", list(arguments)).params
    assert str(given["config"]).startswith("/shared/") and given["out"].startswith("/shared/")


def test_the_slurm_script_asks_for_what_it_uses() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", BLOCKS["slurm"], flags=re.MULTILINE))
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("B:TERM@")
    assert "cpus-per-task" in options and "$SLURM_CPUS_PER_TASK" in BLOCKS["slurm"]
    assert BLOCKS["slurm"].rstrip().splitlines()[-1].startswith("exec python cli.py merge ")


def test_the_trackers_are_keys_of_a_config(tmp_path: Path) -> None:
    plan = plan_of(tiny.make_merge(tmp_path, experts=1, **yaml.safe_load(BLOCKS["trackers"])))
    assert "tensorboard" in plan.config.log_with and plan.config.log_dir == "/shared/logs"


def run(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a shell block in the root of the repository, after the block that sets the variables."""
    script = f"set -euo pipefail\n{BLOCKS['variables']}{BLOCKS[name]}"
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_a_plan_needs_no_cluster(llama_merge: Path) -> None:
    planned = run("plan", clean_environment() | {"CONFIG": str(llama_merge)})
    assert planned.returncode == 0, planned.stderr
    assert "expert_merging" in planned.stdout and "`cluster.rates`" in planned.stdout


def test_a_token_is_made_and_shown(tmp_path: Path) -> None:
    made = run("token", clean_environment() | {"HOME": str(tmp_path)})
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == (tmp_path / ".ray" / "auth_token").read_text().strip() != ""


# A wrapper of the `ray` command. Gives each node on this machine ports, resources and a temporary folder of its own.
RAY = f"""#!{sys.executable}
import os, socket, sys, tempfile

def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

own = []
if sys.argv[1] == "start":
    own = ["--num-cpus=2", "--object-store-memory=120000000", f"--dashboard-agent-listen-port={{free_port()}}"]
    own.append(f"--temp-dir={{tempfile.mkdtemp(dir=os.environ['RAY_TMPDIR'])}}")
    if "SLURM_JOB_ID" in os.environ and "--head" in sys.argv:
        own.append(f"--dashboard-port={{free_port()}}")
os.execv({str(BIN / "ray")!r}, ["ray", *sys.argv[1:], *own])
"""
# Stands in for SLURM's `srun`: drops its options and runs the command once for each task, on this machine.
SRUN = f"""#!{sys.executable}
import subprocess, sys

options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
options = options[: next((i for i, argument in enumerate(sys.argv[1:]) if not argument.startswith("--")))]
tasks = int(next(option.partition("=")[2] for option in options if option.startswith("--ntasks=")))
started = [subprocess.Popen(sys.argv[1 + len(options) :]) for _ in range(tasks)]
sys.exit(max(process.wait() for process in started))
"""
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && [ "$3" = "here[1-2]" ] && printf '127.0.0.1\\n127.0.0.2\\n'
"""


def install(folder: Path, **scripts: str) -> None:
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@contextmanager
def started(script: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a shell script; at the end of the context, send SIGTERM to it and to every process that it started.

    The script may have exited before the processes that it started, so these are found by a mark.
    """
    environment = environment | new_mark()
    with open(log, "ab") as opened:
        process = subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=environment, stdout=opened, stderr=opened)
    try:
        yield process
    finally:
        send(signal.SIGTERM, marked(environment))
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        kill(marked(environment))  # a raylet whose head has gone waits for it
        process.wait(60)
        wait_until(lambda: not marked(environment), log)


def wait_until(done: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@dataclass
class Cluster:
    """The cluster that the page starts by hand, and the results of the blocks that were run on it."""

    environment: dict[str, str]
    folder: Path
    store: Store
    said: dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def by_hand(warm_libraries: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start the head and a worker, and run the blocks that must be run in direct succession."""
    folder = tmp_path_factory.mktemp("page")
    install(folder / "bin", ray=RAY)
    config = tiny.make_merge(folder / "merge")
    ports = {name: str(free_port()) for name in ("PORT", "DASHBOARD", "METRICS", "WORKER_METRICS")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    environment = clean_environment() | ports | token
    environment |= {"HEAD": "127.0.0.1", "CONFIG": str(config), "OUT": str(folder / "merged")}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    log = folder / "log"
    # Ray's sockets are created below this folder, and a socket's path is limited to 107 bytes.
    with serving() as url, tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as temporary, ExitStack() as nodes:
        store = Store(url, "bucket")
        store.ask("PUT", store.bucket)
        environment |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": url, "BUCKET": store.bucket, "RAY_TMPDIR": temporary}
        environment["EXPERT_MERGING_CACHE"] = str(folder / "cache")
        nodes.enter_context(started(BLOCKS["head"], environment, log))
        wait_until(lambda: run("status", environment).returncode == 0, log)
        nodes.enter_context(started(BLOCKS["worker"], environment | {"METRICS": ports["WORKER_METRICS"]}, log))
        wait_until(lambda: run("status", environment).stdout.count("node_") == 2, log)
        said = {name: run(name, environment) for name in ("submit", "metrics")}
        yield Cluster(environment, Path(temporary), store, said)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_by_hand_merges_a_submitted_job(by_hand: Cluster) -> None:
    submitted = by_hand.said["submit"]
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    AutoModelForCausalLM.from_pretrained(by_hand.environment["OUT"])
    code = [sys.executable, "-c", BLOCKS["codes"]]
    told = subprocess.run(code, env=by_hand.environment, capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(r"(raysubmit_\w+ SUCCEEDED 0\n)+", told.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pages_gauges_are_there(by_hand: Cluster) -> None:
    shown = by_hand.said["metrics"]
    assert shown.returncode == 0, shown.stderr
    names = set(re.findall(r"^\| `(.*)` \| `\w+` \|", PAGE.partition("| `ray_expert_merging_` |")[2], re.M))
    told = {name for line in names for name in line.split("`, `")} - {"entropy"}
    assert told == set(re.findall(r"^ray_expert_merging_(\w+){", shown.stdout, re.M))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prometheus_finds_every_node(by_hand: Cluster) -> None:
    (scrape,) = yaml.safe_load(BLOCKS["prometheus"])["scrape_configs"]
    (file,) = scrape["file_sd_configs"][0]["files"]
    (written,) = by_hand.folder.glob(f"*/{Path(file).name}")
    groups = json.loads(written.read_text())
    ports = {target.rpartition(":")[2] for group in groups for target in group["targets"]}
    assert {by_hand.environment["METRICS"], by_hand.environment["WORKER_METRICS"]} <= ports


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_the_rayjobs_entrypoint_runs_on_the_head(by_hand: Cluster, tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "shared")
    entrypoint = yaml.safe_load(BLOCKS["rayjob"])["spec"]["entrypoint"]
    here = entrypoint.replace("/app/", f"{ROOT}/").replace("/shared", str(config.parent))
    # The KubeRay operator submits the entrypoint in the same way.
    submit = [BIN / "ray", "job", "submit", "--address", f"http://127.0.0.1:{by_hand.environment['DASHBOARD']}", "--"]
    done = subprocess.run(
        [*submit, *shlex.split(here)], env=by_hand.environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (config.parent / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_object_storage_holds_base_and_output(by_hand: Cluster) -> None:
    store, config = by_hand.store, Path(by_hand.environment["CONFIG"])
    store.put_all(config.parent / "base", "base")
    merged = run("storage", by_hand.environment)
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert (
        store.get("merged/model.safetensors") == (Path(by_hand.environment["OUT"]) / "model.safetensors").read_bytes()
    )
    kept = store.keys()
    assert {key.partition("/")[0] for key in kept} == {"base", "merged"}, "the state of the run is removed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_slurm_script_merges_on_two_nodes(warm_libraries: None, tmp_path: Path) -> None:
    install(tmp_path / "bin", ray=RAY, srun=SRUN, scontrol=SCONTROL)
    config = tiny.make_merge(tmp_path / "merge", cluster={"shards": 2})
    given = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    given |= {"SLURM_CPUS_PER_TASK": "2", "PORT": str(free_port())}
    environment = clean_environment() | given | {"CONFIG": str(config), "OUT": str(tmp_path / "merged")}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    log = tmp_path / "log"
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as temporary,
        started(BLOCKS["slurm"], environment | {"RAY_TMPDIR": temporary}, log) as script,
    ):
        assert script.wait(400) == 0, log.read_text()
    figures = json.loads((tmp_path / "merged" / "merge" / "memory.json").read_text())
    assert [actor["role"] for actor in figures["actors"]].count("shard 1") == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
