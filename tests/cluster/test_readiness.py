"""Trainer and experts whose GPUs are too small: more GPUs, or an error with numbers and what would fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import plan_of
from errors import refused

from cluster.placement import Devices, machines
from cluster.readiness import MoreGpus, Readiness
from cluster.seats import Node
from engine.errors import ClusterError, GpuMemoryError
from engine.planning.costs.fitting import Role
from engine.planning.costs.rates import GB
from engine.planning.costs.scaling import Work

WORK = Work(tokens=10, samples=8, steps=4, passes=1, pass_tokens=40)
NODES = [Node(8, 0, 1e12, "head"), Node(8, 4, 1e12, "a"), Node(8, 2, 1e12, "b")]


def readiness(merge: Path, *overrides: str, begun: bool = False) -> tuple[Readiness, list[Devices]]:
    plan, kept = plan_of(merge, *overrides), list[Devices]()
    devices = Devices.of(NODES, plan.config)
    alive = machines(NODES, plan.config, devices)
    return Readiness(plan, WORK, alive, NODES, devices, kept.append, begun), kept


@pytest.mark.parametrize("role", ["trainer", "expert"])
def test_an_actor_that_fits_is_ready(llama_merge: Path, role: Role) -> None:
    ready, kept = readiness(llama_merge)
    enough = int(ready.wanted(role)) + 1
    ready.check(role, (enough,))
    ready.check(role, ())
    on_cpu, _ = readiness(llama_merge, f"cluster.{role}.num_gpus=0")
    on_cpu.check(role, (1,))
    several, _ = readiness(llama_merge, f"cluster.{role}.num_gpus=2")
    several.check(role, (int(0.6 * enough),) * 2)
    assert kept == []


@pytest.mark.parametrize("role", ["trainer", "expert"])
def test_automatic_actors_get_more_gpus(llama_merge: Path, role: Role) -> None:
    ready, kept = readiness(llama_merge)
    with pytest.raises(MoreGpus):
        ready.check(role, (int(ready.wanted(role) / 2),))
    assert kept == [replace(ready.devices, **{role: 3.0})]  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["trainer", "expert"])
@pytest.mark.parametrize(
    ("overrides", "begun", "share", "named"),
    [
        (("{role}.num_gpus=1",), False, 0.5, "num_gpus: 3"),
        (("{role}.num_gpus=2",), False, 0.3, "num_gpus: 4"),
        ((), True, 0.5, "--fresh"),
        ((), False, 0.01, "larger GPUs"),
    ],
)
def test_others_are_told_what_would_fit(
    llama_merge: Path, role: Role, overrides: tuple[str, ...], begun: bool, share: float, named: str
) -> None:
    options = [f"cluster.{override.format(role=role)}" for override in overrides]
    ready, kept = readiness(llama_merge, *options, begun=begun)
    free = int(share * ready.wanted(role))
    gpus = int(getattr(ready.devices, role))
    with refused(
        ClusterError, role, named, facts=[f"{ready.wanted(role) / GB:.2f} GB", f"{gpus * free / GB:.2f} GB"]
    ) as failed:
        ready.check(role, (free,) * gpus)
    assert failed.value.exit_code == 3 and kept == []
    assert begun == ("--fresh" in failed.value.do)


def test_an_actor_that_ran_out_of_memory_is_told_what_needs_less(llama_merge: Path) -> None:
    ready, _ = readiness(llama_merge)
    trainer = ready.advised(GpuMemoryError("ran out with 70 GB in use", "trainer"))
    assert "`gradient" in trainer.do and "cluster.trainer.num_gpus: 2" in trainer.do and "70 GB" in trainer.what
    expert = ready.advised(GpuMemoryError("ran out", "expert 3"))
    assert "cluster.expert.num_gpus: 2" in expert.do and "gradient" not in expert.do
    assert trainer.exit_code == expert.exit_code == 3
