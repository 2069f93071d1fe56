"""The seats of the trainers besides the first, on clusters of many shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import plan_of
from test_placement import cluster_of, config

from cluster.placement import Devices
from cluster.seats import Seat, Seating
from cluster.trainer_seats import arrange_trainers, reserved_place
from cluster.trainers import Trainers
from engine.config.resources import GradientUse
from engine.planning.costs.scaling import Work
from engine.planning.costs.trainers import with_gradients
from engine.planning.plan import Plan

WORK = Work(tokens=512, samples=64, steps=4, passes=16, pass_tokens=512)


@pytest.fixture(scope="module")
def plan(llama_merge: Path) -> Plan:
    return plan_of(llama_merge, "parameters.task_vectors=orthogonal", "parameters.gradient_accumulation=16")


def arranged(
    plan: Plan, nodes: list[tuple[float, float]], experts: int, gradients: GradientUse = "auto", **cluster: Any
) -> Seating:
    given = plan.config.model_copy(update={"cluster": config(1, **cluster).cluster})
    planned = with_gradients(replace(plan, config=given, experts=tuple(plan.experts[:1]) * experts), gradients)
    there = cluster_of(*nodes)
    return arrange_trainers(there, planned, WORK, Devices.of(there, planned.config))


@pytest.mark.parametrize(
    ("nodes", "experts", "trainers", "others", "inside"),
    [
        ([(16, 8)], 8, 8, {"n0": 7}, 1),
        ([(16, 8)], 1, 8, {"n0": 7}, 1),
        ([(16, 1)], 4, 1, {}, 0),
        ([(8, 2), (8, 2)], 4, 4, {"n0": 1, "n1": 2}, 1),
        ([(8, 2), (8, 0)], 4, 2, {"n0": 1}, 1),
        ([(16, 8), (16, 8), (16, 8)], 9, 16, {"n0": 5, "n1": 5, "n2": 5}, 1),
    ],
)
def test_trainers_take_the_gpus_that_experts_leave(
    plan: Plan,
    nodes: list[tuple[float, float]],
    experts: int,
    trainers: int,
    others: dict[str, int],
    inside: int,
) -> None:
    layout = arranged(plan, nodes, experts)
    assert layout.gradients == "stream"
    assert len(layout.others) == trainers - 1
    assert sum(layout.others[i].node in others for i in range(trainers - 1)) == sum(others.values())
    assert max(Counter(seat.node for seat in layout.others).values(), default=0) <= max(others.values(), default=0) + 1
    places = [reserved_place(layout, other) for other in range(trainers - 1)]
    assert places.count(len(layout.shards) + 1) == inside and places[inside:].count(None) == trainers - 1 - inside


@pytest.mark.parametrize("nodes", [[(16, 8)], [(8, 1), (8, 4)], [(8, 4), (8, 4), (8, 1)]])
@pytest.mark.parametrize("each", [(1, 1), (2, 1), (1, 2), (0.5, 0.25), (4, 1), (1, 0.5)], ids=str)
def test_no_node_is_asked_for_more_gpus_than_it_has(
    plan: Plan, nodes: list[tuple[float, float]], each: tuple[float, float]
) -> None:
    layout = arranged(plan, nodes, 4, trainer={"num_gpus": each[1]}, expert={"num_gpus": each[0]})
    assert layout.home is not None
    used, reserved = Counter({layout.home.node: layout.home.gpus}), len(layout.shards) + 1
    if layout.beside:
        used[layout.experts[0].node] += layout.experts[0].gpus
    within = 0.0
    for other, seat in enumerate(layout.others):
        if reserved_place(layout, other) == reserved:
            assert layout.beside and seat.node == layout.experts[0].node
            within += seat.gpus
        else:
            used[seat.node] += seat.gpus
    assert within <= layout.experts[0].gpus
    assert all(used[f"n{index}"] <= gpus for index, (_, gpus) in enumerate(nodes))


def test_on_cpus_there_are_as_many_as_given_and_the_nodes_take_turns(plan: Plan) -> None:
    assert arranged(plan, [(8, 0), (8, 0)], 2).others == ()
    layout = arranged(plan, [(8, 0), (8, 0)], 2, trainers=4)
    assert layout.trainer is not None and layout.trainer.node == "n0"
    assert [seat.node for seat in layout.others] == ["n1", "n0", "n1"]
    assert all(seat.cpus == seat.gpus == 0 and reserved_place(layout, 0) is None for seat in layout.others)


def test_a_run_keeps_how_it_holds_the_gradient(plan: Plan) -> None:
    began, later = cluster_of((16, 1)), cluster_of((16, 8))
    for gradients, trainers in (("accumulate", 1), ("stream", 8)):
        devices = replace(Devices.of(began, plan.config), gradients=gradients)
        again = arrange_trainers(later, plan, WORK, devices)
        assert (again.gradients, 1 + len(again.others)) == (gradients, trainers)


@pytest.mark.parametrize(("others", "late"), [(2, True), (0, False)])
def test_trainers_that_are_late_for_all_the_work_are_named(others: int, late: bool) -> None:
    said: list[str] = []
    attempt: Any = SimpleNamespace(progress=SimpleNamespace(say=said.append), report=lambda trainer: None)
    crew: Any = SimpleNamespace(layout=SimpleNamespace(others=[Seat("n0", 0)] * others), dismiss=lambda trainer: None)
    targets: Any = SimpleNamespace(ended=False)
    Trainers(attempt, crew, targets, "first").end()
    assert bool(said) == late and all(str(others) in line for line in said)
