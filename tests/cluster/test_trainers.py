"""Merges with several trainers on a real Ray: the same bits as with one, also if one of them dies."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import tiny
from cluster_helpers import result, run_merge
from conftest import plan_of
from processes import descendants, kill, titled
from psutil import Process

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_ray")]

OPTIONS = ("gradients=stream", "batch_tokens=11", "cluster.factors=always", "parameters.task_vectors=orthogonal")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"parameters": {"budget": 1.5, "gradient_accumulation": 3}, "cluster": {"shards": 1}}
    return tiny.make_merge(tmp_path_factory.mktemp("merge"), samples=(6, 6), **options)


@pytest.fixture(scope="module")
def merged(small_ray: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference merge, with one trainer."""
    return run_merge(plan_of(config, *OPTIONS), tmp_path_factory.mktemp("out") / "merged")


def trainers() -> list[Process]:
    return titled("ray::Trainer", descendants(os.getpid()))


def test_trainers_of_several_that_die_are_replaced_with_the_same_bits(
    config: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In stage 2, the second trainer is killed while both are at work, and then the first one."""
    first: set[int] = set()
    killed: list[bool] = []
    printed = ""

    def disturb(phase: str) -> None:
        nonlocal printed
        printed += capsys.readouterr().out
        if phase == "orthogonal task vectors":
            first.update(process.pid for process in trainers())
        if phase == "stage 1" and "2 of 2" not in printed:
            time.sleep(2)  # a step is much shorter than the start of a process
        if phase == "stage 2" and len(killed) < 2:
            victims = [process for process in trainers() if (process.pid in first) == bool(killed)]
            kill(victims)
            killed.append(len(set(victims)) == 1)

    other = run_merge(plan_of(config, *OPTIONS, "cluster.trainers=2"), tmp_path / "merged", disturb)
    assert killed == [True, True] and "2 of 2" in printed
    assert result(other) == result(merged)
    roles = [actor["role"] for actor in json.loads((other / "merge" / "memory.json").read_text())["actors"]]
    assert roles == ["driver", "expert 0", "trainer", "trainer 1", "shard 0"]
