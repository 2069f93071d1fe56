"""A selection of the fault injection cells, and a fault that repeats; `make chaos` runs all cells."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import chaos
import pytest
from processes import kill
from thorough import thorough_but

from engine.errors import RunError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

SEED = 20260
# Several trainers in processes of one node: test_trainers.py.
CELLS = [
    ("Expert", "reading the experts"),
    ("node of Expert", "targets"),
    ("node of Shard", "orthogonal task vectors"),
    ("Trainer", "stage 1"),
    ("node of Trainer", "stage 2"),
    ("node of one of 2 Trainers", "stage 1"),
    ("Shard", "importance"),
    ("node of Shard", "writing"),
    ("driver", "stage 1"),
]
# The other cells are like these, of another process or phase.
QUICK = [CELLS[0], CELLS[2], CELLS[8]]


@pytest.fixture(scope="module")
def given(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chaos.Given]:
    with chaos.merges(tmp_path_factory.mktemp("chaos")) as given:
        yield given


@pytest.mark.parametrize(("victim", "phase"), thorough_but(QUICK, CELLS))
def test_the_output_after_a_fault_is_bit_identical(given: chaos.Given, victim: str, phase: str, tmp_path: Path) -> None:
    outcome = chaos.run_cell(given, victim, phase, SEED, tmp_path)
    assert outcome.struck
    assert outcome.code == 0, outcome.log
    assert outcome.same, outcome.log


def test_a_run_whose_experts_always_die_fails_after_a_bounded_number_of_tries(
    given: chaos.Given, tmp_path: Path
) -> None:
    nodes = given.nodes
    nodes.mend()
    driver = chaos.Driver(given.config, tmp_path / "out", nodes.cluster.address, given.environment)
    over, killed = threading.Event(), set[int]()

    def kill_every_expert() -> None:
        while not over.wait(0.1):
            found = nodes.workers("Expert")
            killed.update(process.pid for process in found)
            kill(found)

    killer = threading.Thread(target=kill_every_expert)
    killer.start()
    try:
        code = driver.end()
    finally:
        over.set()
        killer.join()
    log = "".join(driver.lines)
    assert code == RunError.exit_code, log
    # Ray adds lines of its own to this log, which may contain the word.
    assert sum(line.startswith("error: ") for line in driver.lines) == 1 and "Traceback" not in log, log
    assert 4 <= len(killed) <= 12
    assert not (tmp_path / "out").exists()
