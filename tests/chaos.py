"""Inject faults into merges on a simulated cluster and check that the result is bit-identical.

`python tests/chaos.py` runs every combination of victim and phase and prints a table of recovery times; `--cells`
selects some of them. Each cell is one merge, started through the command line, on a head without CPUs and three nodes.
At a random moment of the phase the victim is killed with SIGKILL: the process of an actor; a node, that is, its raylet
and every process below it; or the driver, whose command is then run again. Nodes are not replaced during a cell: a run
that loses one finishes on the remaining two.

Only descendants of this process are killed. Other clusters on the same machine are not affected.
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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import ray.cluster_utils
import rich.console
import rich.table
from psutil import Process

# When this file runs as a script, tests/engine and tests/cluster would otherwise hide the packages of the same names.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import tiny
from cluster_helpers import result
from processes import descendants, kill, titled

ROOT = Path(__file__).resolve().parent.parent
# A node that does not answer for about four seconds is declared dead. With less, live nodes are lost on a busy machine.
SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}
PHASES = ("reading the experts", "targets", "orthogonal task vectors", "stage 1", "importance", "stage 2", "writing")
ROLES = ("Expert", "Trainer", "Shard")
# The phases in which each actor runs: experts exit when their targets are stored, the trainer before the output.
LIVES = {"Expert": PHASES[:2], "Trainer": PHASES[:-1], "Shard": PHASES}
CELLS = [(victim, phase) for role in ROLES for victim in (role, f"node of {role}") for phase in LIVES[role]]
CELLS += [("driver", phase) for phase in PHASES]
# Merges with two trainers, whose expected output is that of one trainer.
TWO = "one of 2 "
SEVERAL, ALONE = (("gradients=stream", f"cluster.trainers={count}") for count in (2, 1))
CELLS += [
    (f"{kind}{TWO}Trainers", phase) for kind in ("", "node of ") for phase in ("stage 1", "importance", "stage 2")
]
LINE = re.compile(r"\[ *[\d.]+ s\] ([a-z][a-z0-9 ]*?)(?:: (\d+)| (\d+)/(\d+))(?: |$)")
LIMIT = 300.0
TRIES = 4


@dataclass(frozen=True)
class Outcome:
    """The result of a cell.

    Attributes:
        struck: What was killed.
        same: Whether the output is bit-identical to that of the undisturbed run.
        code: The exit code of the driver.
        recovery: Seconds from the kill until the run advanced beyond its progress before the kill.
        longer: Seconds that the run took longer than the undisturbed run.
        log: The output of the driver.
    """

    struck: str
    same: bool
    code: int
    recovery: float
    longer: float
    log: str


@dataclass(frozen=True, eq=False)
class Given:
    """What the cells share.

    Attributes:
        nodes: The cluster.
        config: The config of the merge.
        folder: For the outputs of undisturbed runs.
        environment: The environment of a driver.
    """

    nodes: Nodes
    config: Path
    folder: Path
    environment: dict[str, str]

    @cache  # noqa: B019 - there is one of this class
    def undisturbed(self, options: tuple[str, ...] = ()) -> tuple[dict[str, bytes], float]:
        """The files of an undisturbed run's output, see `cluster_helpers.result`, and the run's duration."""
        self.nodes.mend()
        began, out = time.monotonic(), self.folder / "-".join(("undisturbed", *options))
        driver = Driver(self.config, out, self.nodes.cluster.address, self.environment, options)
        assert driver.end() == 0, "".join(driver.lines)
        return result(out), time.monotonic() - began


class Nodes:
    """A head and three nodes; `mend` replaces the nodes that a cell killed."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False, "_system_config": SYSTEM}
        self.cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        self.mend()

    def mend(self) -> None:
        while len(self.cluster.worker_nodes) < 3:
            self.cluster.add_node(**NODE)

    def raylets(self) -> dict[int, Any]:
        """The nodes that can be killed, by the process id of their raylets, which are children of this process."""
        found = ((node.all_processes["raylet"][0].process, node) for node in self.cluster.worker_nodes)
        return {process.pid: node for process, node in found if process.poll() is None}

    def workers(self, role: str) -> list[Process]:
        """The processes of the actors of a role on these nodes."""
        return [one for raylet in self.raylets() for one in titled(f"ray::{role}", descendants(raylet))]

    def kill_node_of(self, worker: Process) -> bool:
        """Kill the raylet of the node with this worker and all processes below it; False if the worker has exited."""
        for raylet, node in self.raylets().items():
            below = descendants(raylet)
            if worker in below:
                kill([Process(raylet), *below])
                self.cluster.remove_node(node, allow_graceful=False)
                return True
        return False


class Driver:
    """A merge started through the command line, whose output is read line by line."""

    def __init__(
        self, config: Path, out: Path, address: str, environment: dict[str, str], options: Iterable[str] = ()
    ) -> None:
        command = [sys.executable, ROOT / "cli.py", "merge", config, "--out", out, "--address", address]
        command += [word for option in options for word in ("--set", option)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=config.parent
        )
        self.lines: list[str] = []
        self.timer = threading.Timer(LIMIT, self.kill)
        self.timer.start()

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """Yield (phase, parts done, total parts) for each line of output that reports progress."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = LINE.match(line)
            if found:
                name = found[1] if not found[1].startswith("writing") else "writing"
                yield name, int(found[3] or 0), int(found[2] or found[4])

    def kill(self) -> None:
        kill([*descendants(self.process.pid), Process(self.process.pid)])

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
    """Start the cluster and make the undisturbed merge that all cells are compared with."""
    options = {"max_shard_size": 30_000, "cluster": {"shards": 3, "wait": 60}}
    parameters = {"budget": 1.5, "gradient_accumulation": 2, "task_vectors": "orthogonal"}
    config = tiny.make_merge(
        folder / "merge", experts=3, samples=(8, 8, 8), sharded=True, parameters=parameters, **options
    )
    # Each merge goes through all phases.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "EXPERT_MERGING_RUN_CACHE": "off"}
    environment.pop("RAY_ADDRESS", None)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in conftest
    nodes = Nodes()
    try:
        given = Given(nodes, config, folder, environment)
        given.undisturbed()
        yield given
    finally:
        nodes.cluster.shutdown()


def strike(nodes: Nodes, victim: str, driver: Driver, random_: random.Random) -> str:
    """Kill the victim and return a description of it, or an empty text if it is not running any more."""
    if victim == "driver":
        driver.kill()
        return f"pid {driver.process.pid}"
    there = nodes.workers(victim.removeprefix("node of ").removeprefix(TWO).removesuffix("s"))
    if not there:
        return ""
    worker = random_.choice(there)
    if victim.startswith("node"):
        return f"node of pid {worker.pid}" if nodes.kill_node_of(worker) else ""
    kill([worker])
    return f"pid {worker.pid}"


def run_cell(given: Given, victim: str, phase: str, seed: int, out: Path) -> Outcome:
    """Run one cell; if the victim has already exited at the moment of the kill, try again at another moment."""
    nodes, config, environment = given.nodes, given.config, given.environment
    options = SEVERAL if TWO in victim else ()
    expected, seconds = given.undisturbed(ALONE if options else ())
    random_ = random.Random(f"{seed} {victim} {phase}")
    for attempt in range(TRIES):
        nodes.mend()
        target = out / f"{victim} {phase} {attempt}".replace(" ", "-")
        began = time.monotonic()
        driver = Driver(config, target, nodes.cluster.address, environment, options)
        struck, moment, recovery = "", None, 0.0
        seen: set[tuple[str, int]] = set()
        when = 0.0
        for name, done, total in driver:
            if name == phase and moment is None:
                # Any part of the phase except the last one.
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
            same = code == 0 and result(target) == expected
            return Outcome(struck, same, code, recovery, time.monotonic() - began - seconds, log)
    raise AssertionError(f"{victim} had exited before it could be killed in {phase}, {TRIES} times:\n{log}")


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--cells", help="Run only these cells, such as 'Trainer/stage 1,driver/writing'.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(seed: int, cells: str | None, json_path: Path | None) -> None:
    """Run the cells and print a table of the recovery times."""
    wanted: Iterable[tuple[str, ...]] = [tuple(cell.split("/")) for cell in cells.split(",")] if cells else CELLS
    outcomes: dict[tuple[str, str], Outcome] = {}
    with tempfile.TemporaryDirectory() as folder, merges(Path(folder)) as given:
        for victim, phase in wanted:
            outcome = run_cell(given, victim, phase, seed, Path(folder))
            outcomes[victim, phase] = outcome
            told = "bit-identical" if outcome.same else f"DIFFERENT (exit {outcome.code})\n{outcome.log}"
            print(
                f"{victim} killed in {phase}: {told}, {outcome.recovery:.1f} s to new progress, "
                f"{outcome.longer:+.0f} s in total",
                flush=True,
            )
    seconds = given.undisturbed()[1]
    title = f"seconds from the kill to new progress (and added to the run of {seconds:.0f} s); seed {seed}"
    table = rich.table.Table("killed", *PHASES, title=title)
    for victim in dict.fromkeys(victim for victim, _ in outcomes):
        row = [outcomes.get((victim, phase)) for phase in PHASES]
        cells_of = ["" if o is None else f"{o.recovery:.1f} ({o.longer:+.0f})" if o.same else "WRONG" for o in row]
        table.add_row(victim, *cells_of)
    rich.console.Console(width=110).print(table)
    same = sum(outcome.same for outcome in outcomes.values())
    print(f"{same} of {len(outcomes)} cells: output bit-identical to the undisturbed run")
    if json_path:
        figures = {
            "/".join(cell): {"recovery": o.recovery, "longer": o.longer, "same": o.same} for cell, o in outcomes.items()
        }
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(same != len(outcomes))


if __name__ == "__main__":
    main()
