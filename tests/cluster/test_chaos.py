"""Some cells of the matrix of faults, and a fault that repeats; `make chaos` runs the whole matrix."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import chaos
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

SEED = 20260
CELLS = [
    ("node of Expert", "targets"),
    ("node of Shard", "orthogonal task vectors"),
    ("Trainer", "stage 1"),
    ("node of Trainer", "stage 2"),
    ("Shard", "importance"),
    ("node of Shard", "writing"),
    ("driver", "stage 1"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chaos.Given]:
    with chaos.merges(tmp_path_factory.mktemp("chaos")) as given:
        yield given


@pytest.mark.parametrize(("victim", "phase"), CELLS)
def test_a_run_survives_with_the_same_bits(given: chaos.Given, victim: str, phase: str, tmp_path: Path) -> None:
    outcome = chaos.run_cell(given, victim, phase, SEED, tmp_path)
    assert outcome.struck
    assert outcome.code == 0, outcome.log
    assert outcome.same, outcome.log


def test_an_expert_that_always_dies_ends_the_run_with_its_cause(given: chaos.Given, tmp_path: Path) -> None:
    nodes = given.nodes
    nodes.mend()
    driver = chaos.Driver(given.config, tmp_path / "out", nodes.cluster.address, given.environment)
    over, killed = threading.Event(), set[int]()

    def kill_every_expert() -> None:
        while not over.wait(0.1):
            for pid in nodes.workers("Expert"):
                killed.add(pid)
                chaos.kill(pid)

    killer = threading.Thread(target=kill_every_expert)
    killer.start()
    try:
        code = driver.end()
    finally:
        over.set()
        killer.join()
    log = "".join(driver.lines)
    assert code == 4, log
    assert "error: an actor died while" in log and "again when started anew" in log
    assert "Traceback" not in log
    assert 4 <= len(killed) <= 12, "a bounded number of tries"
    assert not (tmp_path / "out").exists()
