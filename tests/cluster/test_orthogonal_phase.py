"""Where task vectors are made orthogonal: on the shards, or on shards in the seats of experts that have GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import plan_of

import cluster.crew
from cluster.crew import Crew
from cluster.learned_merge import LearnedMerge
from cluster.seats import Seat, Seating
from engine.run.run_folder import RunFolder
from engine.shards.parts import parts_file, tensor_groups
from engine.sizes import MATRICES_PER_CALL


class Worker(SimpleNamespace):
    """A shard whose calls return at once."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str) -> None:
        remote: Callable[..., Any] = lambda names, _: {one: f"{one} by {name}" for one in names}  # noqa: E731
        report = SimpleNamespace(remote=lambda: f"report of {name}")
        super().__init__(name=name, orthogonalise=SimpleNamespace(remote=remote), report=report)


@pytest.mark.parametrize("gpus", [0, 1])
def test_it_runs_where_the_experts_compute(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    plan = plan_of(llama_merge, "parameters.task_vectors=orthogonal")
    done, folder = list[str](), RunFolder(str(tmp_path / "out"))
    folder.state.write(parts_file(0, 0), b"left over")
    merge = object.__new__(LearnedMerge)
    merge.plan, merge.folder, merge.reports = plan, folder, []
    merge.watch = SimpleNamespace(answer=lambda reference, what: reference)  # type: ignore[assignment]

    def spread(phase: str, workers: list[Worker], tasks: list[list[str]], ask: Any, before: int = 0) -> list[Any]:
        assert max(map(len, tasks)) <= MATRICES_PER_CALL
        done.append("spread")
        return [ask(workers[number % len(workers)], task) for number, task in enumerate(tasks)]

    def started(count: int) -> list[Worker]:
        done.append("start")
        return [Worker("g0"), Worker("g1")]

    monkeypatch.setattr(merge, "spread", spread)
    crew: Any = SimpleNamespace(
        shards=[Worker("s0")],
        layout=SimpleNamespace(experts=(Seat("node", 1, gpus),) * 2, factored=()),
        shards_of_experts=started,
        dismiss=lambda worker: done.append(f"dismiss {worker.name}"),
    )
    targets: Any = SimpleNamespace(all_stored=lambda: done.append("experts end"))
    found = merge._orthogonal(crew, targets, tensor_groups(plan))
    assert set(found) == set(plan.orthogonal)
    by = {str(one).rpartition(" ")[2] for one in found.values()}
    if gpus:
        assert by == {"g0", "g1"}
        assert done == ["experts end", "start", "spread", "dismiss g0", "dismiss g1"]
        assert merge.reports == ["report of g0", "report of g1"]
    else:
        assert by == {"s0"} and done == ["spread"] and merge.reports == []
    assert folder.state.names("parts") == set()


@pytest.mark.parametrize(("free", "expected"), [({0, 1, 2}, [0, 1, 2]), ({0}, [0]), ({0, 2}, [0, 2])])
def test_a_seat_that_another_job_occupies_is_left_out(
    monkeypatch: pytest.MonkeyPatch, free: set[int], expected: list[int]
) -> None:
    crew, dismissed = object.__new__(Crew), list[Any]()
    crew.layout, crew.shards = Seating((), experts=(Seat("node", 1, 1),) * 3), [Worker("s0")]
    seats: dict[int, Worker] = {}

    def in_seat(kind: type, label: str, index: int, arguments: Any) -> Worker:
        return seats.setdefault(index, Worker(str(index)))

    def wait(calls: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        late = [f"report of {index}" for index in range(3) if index not in free]
        return [call for call in calls if call not in late], [call for call in calls if call in late]

    monkeypatch.setattr(crew, "_in_seat", in_seat)
    monkeypatch.setattr(crew, "dismiss", dismissed.append)
    monkeypatch.setattr(cluster.crew, "ray", SimpleNamespace(wait=wait))
    started = crew.shards_of_experts(9)
    assert started == [seats[index] for index in expected]
    assert dismissed == [seats[index] for index in range(3) if index not in expected]
    assert crew.shards_of_experts(1) == [seats[0]], "no more than there is work for"
