"""Faults in a simulated cluster: what dies, in which phase, and whether the run ends with the same bits.

`python tests/chaos.py` runs the whole matrix and prints it with the seconds to recover; `--cells` some of it. A cell is
a merge through the command line on a head that computes nothing and three nodes. At a random moment of the phase the
victim is killed with SIGKILL: a process of an actor; a node, which is its raylet with every process below it; or the
driver, whose command is then given again. Nothing comes back: a run that loses a node ends on the two that are left.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ray.cluster_utils
import rich.console
import rich.table
import tiny
from cluster_helpers import pids, pids_titled, result

ROOT = Path(__file__).resolve().parent.parent
# A node's silence that long is its death. Much less, and a busy machine loses nodes that are alive.
SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}
PHASES = ("targets", "orthogonal task vectors", "stage 1", "importance", "stage 2", "writing")
ROLES = ("Expert", "Trainer", "Shard")
# Which phases a victim lives to see: experts are gone when their targets are stored, the trainer before the output.
LIVES = {"Expert": PHASES[:1], "Trainer": PHASES[:5], "Shard": PHASES}
CELLS = [(victim, phase) for role in ROLES for victim in (role, f"node of {role}") for phase in LIVES[role]]
CELLS += [("driver", phase) for phase in PHASES]
LINE = re.compile(r"\[ *[\d.]+ s\] ([a-z][a-z0-9 ]*?)(?:: (\d+)| (\d+)/(\d+))(?: |$)")
LIMIT = 300.0
TRIES = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: seconds from the kill to the first progress that was new, by whomever, and those that the
    run took longer than the undisturbed one.
    """

    struck: str
    same: bool
    code: int
    recovery: float
    longer: float
    log: str


@dataclass(frozen=True)
class Given:
    """What every cell has: nodes, a config, what an undisturbed run gives and takes, and a driver's environment."""

    nodes: Nodes
    config: Path
    expected: dict[str, bytes]
    seconds: float
    environment: dict[str, str]


class Nodes:
    """A head and three nodes; `mend` brings back what a cell took."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False, "_system_config": SYSTEM}
        self.cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        self.mend()

    def mend(self) -> None:
        while len(self.cluster.worker_nodes) < 3:
            self.cluster.add_node(**NODE)

    def workers(self, role: str) -> list[int]:
        """The processes of that role, and no other cluster's."""
        ours = {raylet_of(node) for node in self.cluster.worker_nodes}
        return [pid for pid in pids_titled(f"ray::{role}") if parent(pid) in ours]

    def kill_node_of(self, pid: int) -> None:
        raylet = parent(pid)
        node = next(node for node in self.cluster.worker_nodes if raylet_of(node) == raylet)
        below = [one for one in pids() if parent(one) == raylet]
        for one in (raylet, *below):
            kill(one)
        self.cluster.remove_node(node, allow_graceful=False)


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def parent(pid: int) -> int | None:
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Driver:
    """A merge through the command line, its lines read as they come."""

    def __init__(self, config: Path, out: Path, address: str, environment: dict[str, str]) -> None:
        command = [sys.executable, ROOT / "cli.py", "merge", config, "--out", out, "--address", address]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=config.parent
        )
        self.lines: list[str] = []
        self.timer = threading.Timer(LIMIT, self.process.kill)
        self.timer.start()

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """(phase, parts done, parts in all) of each line that tells of one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = LINE.match(line)
            if found:
                name = found[1] if not found[1].startswith("writing") else "writing"
                yield name, int(found[3] or 0), int(found[2] or found[4])

    def end(self) -> int:
        for _ in self:
            pass
        code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.timer.cancel()
        return code


@contextmanager
def merges(folder: Path) -> Iterator[Given]:
    """What the cells share."""
    options = {"max_shard_size": 30_000, "cluster": {"shards": 3, "wait": 60}}
    parameters = {"budget": 1.5, "gradient_accumulation": 2, "task_vectors": "orthogonal"}
    config = tiny.make_merge(
        folder / "merge", experts=3, samples=(8, 8, 8), sharded=True, parameters=parameters, **options
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in conftest
    nodes = Nodes()
    try:
        began = time.monotonic()
        undisturbed = Driver(config, folder / "undisturbed", nodes.cluster.address, environment)
        assert undisturbed.end() == 0, "".join(undisturbed.lines)
        seconds = time.monotonic() - began
        yield Given(nodes, config, result(folder / "undisturbed"), seconds, environment)
    finally:
        nodes.cluster.shutdown()


def strike(nodes: Nodes, victim: str, driver: Driver, random_: random.Random) -> str:
    """Kill the victim; what was killed, or nothing where it was not there any more."""
    if victim == "driver":
        kill(driver.process.pid)
        return f"pid {driver.process.pid}"
    there = nodes.workers(victim.removeprefix("node of "))
    if not there:
        return ""
    pid = random_.choice(there)
    if victim.startswith("node"):
        nodes.kill_node_of(pid)
    else:
        kill(pid)
    return f"pid {pid}"


def run_cell(given: Given, victim: str, phase: str, seed: int, out: Path) -> Outcome:
    """One cell of the matrix; a strike that came too late is tried again, at another moment."""
    nodes, config, environment = given.nodes, given.config, given.environment
    random_ = random.Random(f"{seed} {victim} {phase}")
    for attempt in range(TRIES):
        nodes.mend()
        target = out / f"{victim} {phase} {attempt}".replace(" ", "-")
        began = time.monotonic()
        driver = Driver(config, target, nodes.cluster.address, environment)
        struck, moment, recovery = "", None, 0.0
        seen: set[tuple[str, int]] = set()
        when = 0.0
        for name, done, total in driver:
            if name == phase and moment is None:
                # A part of the phase, and a part of the time that it takes; the first where there is but one.
                moment = random_.randrange(max(1, total - 1))
            if not struck and moment is not None and name == phase and done >= moment:
                struck = strike(nodes, victim, driver, random_)
                when = time.monotonic()
                if not struck:
                    moment = total + 1
            elif struck and (name, done) not in seen and done and not recovery:
                recovery = time.monotonic() - when
            seen.add((name, done))
        code = driver.end()
        log = "".join(driver.lines)
        if victim == "driver" and struck and code == -signal.SIGKILL:
            again = Driver(config, target, nodes.cluster.address, environment)
            for name, done, _ in again:
                if not recovery and done and (name, done) not in seen:
                    recovery = time.monotonic() - when
            code, log = again.end(), log + "".join(again.lines)
        if struck and (victim != "driver" or recovery):
            same = code == 0 and result(target) == given.expected
            return Outcome(struck, same, code, recovery, time.monotonic() - began - given.seconds, log)
    raise AssertionError(f"{victim} was never there to be killed while {phase}:\n{log}")


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--cells", help="Only these: 'Trainer/stage 1,driver/writing'.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Keep the figures here, too.")
def main(seed: int, cells: str | None, json_path: Path | None) -> None:
    """Run the matrix, and print it."""
    wanted: Iterable[tuple[str, ...]] = [tuple(cell.split("/")) for cell in cells.split(",")] if cells else CELLS
    outcomes: dict[tuple[str, str], Outcome] = {}
    with tempfile.TemporaryDirectory() as folder, merges(Path(folder)) as given:
        for victim, phase in wanted:
            outcome = run_cell(given, victim, phase, seed, Path(folder))
            outcomes[victim, phase] = outcome
            told = "same bits" if outcome.same else f"DIFFERENT (exit {outcome.code})\n{outcome.log}"
            print(
                f"{victim} killed in {phase}: {told}, {outcome.recovery:.1f} s to new progress, "
                f"{outcome.longer:+.0f} s in all",
                flush=True,
            )
    title = (
        f"seconds from the kill to new progress (and that the run of {given.seconds:.0f} s took longer); seed {seed}"
    )
    table = rich.table.Table("killed", *PHASES, title=title)
    for victim in dict.fromkeys(victim for victim, _ in outcomes):
        row = [outcomes.get((victim, phase)) for phase in PHASES]
        cells_of = ["" if o is None else f"{o.recovery:.1f} ({o.longer:+.0f})" if o.same else "WRONG" for o in row]
        table.add_row(victim, *cells_of)
    rich.console.Console(width=110).print(table)
    same = sum(outcome.same for outcome in outcomes.values())
    print(f"{same} of {len(outcomes)} cells ended with the bits of the undisturbed run")
    if json_path:
        figures = {
            "/".join(cell): {"recovery": o.recovery, "longer": o.longer, "same": o.same} for cell, o in outcomes.items()
        }
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(same != len(outcomes))


if __name__ == "__main__":
    main()
