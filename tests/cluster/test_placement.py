"""How many actors there are and what each asks for, on clusters of every make."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cluster.placement import Bundle, Node, Placement, place, shortage
from engine.config import Config
from engine.config_file import parse_config


def config(experts: int = 2, **cluster: Any) -> Config:
    models = [{"model": f"e{k}", "calibration": "x.jsonl"} for k in range(experts)]
    raw = {"merge_method": "expert_merging", "base_model": "base", "models": models, "cluster": cluster}
    return parse_config(raw, Path("merge.yaml"))


def total(bundles: Sequence[Bundle], kind: str) -> float:
    return round(sum(bundle.get(kind, 0) for bundle in bundles), 9)


def fits(placement: Placement, node: Node) -> bool:
    """Shards last the whole merge; beside them there are first the experts, then the trainer, or both at once."""
    phases = [(*placement.shards, *placement.experts), (*placement.shards, placement.trainer)]
    if placement.beside:
        phases = [(*placement.shards, *placement.experts, placement.trainer)]
    return all(total(phase, "CPU") <= node.cpus and total(phase, "GPU") <= node.gpus for phase in phases)


def test_without_gpus_nobody_asks_for_one_and_one_expert_runs_on_each_node() -> None:
    placement = place([Node(8, 0)], config(experts=3))
    assert placement.trainer == {"CPU": 1.0}
    assert placement.experts == ({"CPU": 1.0},)
    assert placement.shards == ({"CPU": 1.0},)


@pytest.mark.parametrize(
    ("nodes", "experts", "at_a_time"),
    [
        ([Node(8, 1)], 3, 1),
        ([Node(8, 1)], 1, 1),
        ([Node(16, 8)], 3, 3),
        ([Node(16, 4)], 9, 4),
        ([Node(8, 2), Node(8, 2)], 9, 4),
        ([Node(8, 2), Node(8, 0)], 9, 2),
        ([Node(8, 0), Node(8, 0), Node(8, 0)], 2, 2),
        ([Node(8, 0), Node(8, 0), Node(8, 0)], 9, 3),
        ([Node(0, 0), Node(8, 0), Node(8, 0)], 9, 2),
    ],
)
def test_as_many_experts_at_a_time_as_there_are_places_for(nodes: list[Node], experts: int, at_a_time: int) -> None:
    placement = place(nodes, config(experts))
    assert len(placement.experts) == at_a_time
    gpus = sum(node.gpus for node in nodes)
    assert {bundle.get("GPU", 0) for bundle in placement.experts} == {min(gpus, 1)}
    assert placement.trainer.get("GPU", 0) == min(gpus, 1)
    assert all("GPU" not in bundle for bundle in placement.shards)


@pytest.mark.parametrize(
    ("nodes", "shards", "count"),
    [
        ([Node(8, 0)], "auto", 1),
        ([Node(8, 1), Node(8, 1), Node(8, 1)], "auto", 3),
        ([Node(0, 0), Node(8, 1), Node(8, 1)], "auto", 2),
        ([], "auto", 1),
        ([Node(8, 0)], 5, 5),
        ([Node(8, 1), Node(8, 1), Node(8, 1)], 1, 1),
        ([Node(0, 0), Node(8, 1), Node(8, 1)], 8, 8),
        # One reads and writes the files all the same.
        ([Node(8, 0)], 0, 1),
        ([Node(8, 1), Node(8, 1), Node(8, 1)], 0, 1),
    ],
)
def test_shards_are_as_many_as_asked_for_or_one_a_node_that_has_cpus(
    nodes: list[Node], shards: str | int, count: int
) -> None:
    placement = place(nodes, config(shards=shards))
    assert len(placement.shards) == count
    assert all(set(bundle) == {"CPU"} and 0 < bundle["CPU"] <= 1 for bundle in placement.shards)


@pytest.mark.parametrize("nodes", [[], [Node(8, 0)], [Node(0, 0), Node(8, 1), Node(8, 1)]], ids=len)
def test_only_no_shards_at_all_keep_the_task_vectors_within_the_trainer(nodes: list[Node]) -> None:
    within = {shards: place(nodes, config(shards=shards)).within_trainer for shards in ("auto", 0, 1, 2)}
    assert within == {"auto": False, 0: True, 1: False, 2: False}
    # The trainer then works alone, and asks for no more than it did.
    assert place(nodes, config(shards=0)).trainer == place(nodes, config(shards=1)).trainer


@pytest.mark.parametrize(
    ("expert", "trainer", "at_a_time"), [(0.5, 1, 4), (2, 2, 1), (0, 1, 1), (1, 0, 2), (0.25, 0.25, 6)]
)
def test_gpus_given_by_the_config_are_asked_for(expert: float, trainer: float, at_a_time: int) -> None:
    wanted = config(experts=6, expert={"num_gpus": expert}, trainer={"num_gpus": trainer})
    placement = place([Node(16, 2)], wanted)
    assert len(placement.experts) == at_a_time
    assert {bundle.get("GPU", 0) for bundle in placement.experts} == {expert}
    assert placement.trainer.get("GPU", 0) == trainer


def test_all_start_at_once_where_nobody_waits_for_a_gpu() -> None:
    assert place([Node(8, 0)], config()).beside
    assert not place([Node(8, 1)], config()).beside
    for kind in ("expert", "trainer"):
        assert not place([Node(8, 1)], config(**{kind: {"num_gpus": 0}})).beside, "the other one takes a GPU"


def test_gpus_that_no_node_has_are_asked_for_all_the_same() -> None:
    """So that the wait says what is missing, and a cluster that grows can serve."""
    placement = place([Node(8, 0)], config(expert={"num_gpus": 1}, trainer={"num_gpus": 4}))
    assert placement.experts == ({"CPU": 1.0, "GPU": 1},)
    assert placement.trainer == {"CPU": 1.0, "GPU": 4}


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 64])
def test_one_node_is_never_asked_for_more_than_it_has(cpus: int, gpus: int) -> None:
    node = Node(cpus, gpus)
    for experts, shards in product([1, 2, 5, 9], ["auto", 0, 1, 2, 3, 5, 7, 8]):
        placement = place([node], config(experts, shards=shards))
        assert fits(placement, node), f"{experts} experts, {shards} shards: {placement}"


@pytest.mark.parametrize(
    ("nodes", "shards"),
    [([Node(1, 0)] * 3, "auto"), ([Node(1, 1)] * 3, 8), ([Node(4, 2)] * 2, 7), ([Node(0, 0), *[Node(2, 1)] * 2], 5)],
)
def test_an_even_cluster_is_never_asked_for_more_than_it_has(nodes: list[Node], shards: str | int) -> None:
    placement = place(nodes, config(experts=9, shards=shards))
    assert fits(placement, Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)))
    largest = max(node.cpus for node in nodes)
    everyone = (placement.trainer, *placement.experts, *placement.shards)
    assert all(0 < bundle["CPU"] <= largest / 3 for bundle in everyone)


def test_the_placement_does_not_depend_on_the_order_of_the_nodes() -> None:
    nodes = [Node(0, 0), Node(4, 1), Node(16, 2)]
    assert place(nodes, config()) == place(nodes[::-1], config())


@pytest.mark.parametrize(
    ("nodes", "bundles", "text"),
    [
        ([Node(4, 0)], [{"CPU": 1.0}], "asked for: 1 of 4 CPUs, in 1 parts, on 1 nodes"),
        (
            [Node(4, 1), Node(8.5, 2)],
            [{"CPU": 1.0, "GPU": 4}, {"CPU": 0.25, "GPU": 0.5}],
            "asked for: 1.25 of 12.5 CPUs and 4.5 of 3 GPUs, in 2 parts, on 2 nodes",
        ),
        (
            [Node(4, 0)],
            [{"CPU": 0.5, "GPU": 1}] * 3,
            "asked for: 1.5 of 4 CPUs and 3 of 0 GPUs, in 3 parts, on 1 nodes",
        ),
    ],
)
def test_a_shortage_tells_what_is_asked_for_and_what_there_is(
    nodes: list[Node], bundles: list[Bundle], text: str
) -> None:
    assert shortage(nodes, bundles) == text
