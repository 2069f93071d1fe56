"""The node on which each actor is placed and the resources that it requests there, on clusters of many shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import plan_of
from errors import refused
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Devices, arrange, check_memory, lay_out, lay_out_shards
from cluster.seats import Node, Seat, Seating
from engine.config.reader import parse_config
from engine.config.schema import Config
from engine.errors import ClusterError
from engine.planning.costs.rates import Site
from engine.planning.costs.scaling import Work
from engine.planning.plan import Plan, slices

WORK = Work(tokens=10, samples=8, steps=4, passes=1, pass_tokens=40)


@pytest.fixture(scope="module")
def plan(llama_merge: Path) -> Plan:
    return plan_of(llama_merge)


def config(experts: int = 2, **cluster: Any) -> Config:
    models = [{"model": f"e{k}", "calibration": "x.jsonl"} for k in range(experts)]
    raw = {"merge_method": "expert_merging", "base_model": "base", "models": models, "cluster": cluster}
    raw["parameters"] = {"task_vectors": "whole"}
    return parse_config(raw, Path("merge.yaml"))


def cluster_of(*nodes: tuple[float, float]) -> list[Node]:
    """Nodes with the given numbers of CPUs and GPUs, whose ids are n0, n1, …"""
    return [Node(cpus, gpus, id=f"n{index}") for index, (cpus, gpus) in enumerate(nodes)]


def laid_out(plan: Plan, nodes: Sequence[Node], experts: int = 2, where: Site = "nodes", **cluster: Any) -> Seating:
    planned = replace(plan, config=config(experts, **cluster), experts=tuple(plan.experts[:1]) * experts)
    return lay_out(nodes, planned, Devices.of(nodes, planned.config), where)


def asked_at_once(layout: Seating) -> list[list[Seat]]:
    """The sets of seats that are occupied at the same time in the course of a run."""
    assert layout.trainer is not None and layout.home is not None
    if layout.beside:
        return [[*layout.shards, layout.trainer, *layout.experts]]
    return [[*layout.shards, *layout.experts], [*layout.shards, layout.trainer], [*layout.shards, layout.home]]


def totals(seats: Sequence[Seat]) -> Mapping[str, tuple[float, float]]:
    cpus, gpus = Counter[str](), Counter[str]()
    for seat in seats:
        cpus[seat.node] += seat.cpus
        gpus[seat.node] += seat.gpus
    return {node: (round(cpus[node], 9), round(gpus[node], 9)) for node in cpus}


def test_without_gpus_nobody_asks_for_one_and_all_sit_together(plan: Plan) -> None:
    layout = laid_out(plan, cluster_of((8, 0)), experts=3)
    assert layout.trainer == layout.home == Seat("n0", 1.0)
    assert layout.experts == layout.shards == (Seat("n0", 1.0),)
    assert layout.beside
    assert not layout.overlap, "they share the same cores"


@pytest.mark.parametrize(
    ("nodes", "experts", "at_a_time", "beside"),
    [
        ([(8, 1)], 3, 1, False),
        ([(8, 1)], 1, 1, False),
        ([(16, 8)], 3, 3, True),
        ([(16, 4)], 9, 3, True),
        ([(8, 2), (8, 2)], 9, 3, True),
        ([(8, 2), (8, 0)], 9, 1, True),
        ([(8, 1), (8, 1)], 9, 1, True),
        ([(8, 0), (8, 0), (8, 0)], 1, 1, True),
        ([(8, 0), (8, 0), (8, 0)], 9, 2, True),
        ([(0, 0), (8, 0), (8, 0)], 9, 1, True),
    ],
)
def test_as_many_experts_at_a_time_as_fit_beside_the_trainer(
    plan: Plan, nodes: list[tuple[float, float]], experts: int, at_a_time: int, beside: bool
) -> None:
    layout = laid_out(plan, cluster_of(*nodes), experts)
    assert len(layout.experts) == at_a_time
    assert (layout.beside, layout.overlap) == (beside, beside)
    assert layout.trainer is not None and layout.home is not None
    gpus = min(1, sum(gpus for _, gpus in nodes))
    assert {seat.gpus for seat in layout.experts} == {layout.trainer.gpus} == {gpus}
    assert all(seat.gpus == 0 for seat in layout.shards)


def test_experts_take_the_other_nodes_first(plan: Plan) -> None:
    layout = laid_out(plan, cluster_of((8, 2), (8, 2), (8, 2)), experts=4)
    assert layout.trainer is not None and layout.trainer.node == "n0"
    assert [seat.node for seat in layout.experts] == ["n1", "n2", "n0", "n1"]


def test_on_one_gpu_the_experts_take_their_turns_in_the_trainers_home(plan: Plan) -> None:
    layout = laid_out(plan, cluster_of((8, 1), (8, 0)), experts=4)
    assert layout.home == Seat("n0", 1.0, 1)
    assert [seat.node for seat in layout.experts] == ["n0"]
    assert layout.reserved == (*layout.shards, layout.home)


@pytest.mark.parametrize(
    ("expert", "trainer", "at_a_time", "home"),
    [(0.5, 1, 2, 1), (2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 1, 2), (0, 1, 1, 1), (1, 0, 2, 0), (0.25, 0.25, 6, 0.25)],
)
def test_gpus_given_by_the_config_are_asked_for(
    plan: Plan, expert: float, trainer: float, at_a_time: int, home: float
) -> None:
    layout = laid_out(plan, cluster_of((16, 2)), 6, expert={"num_gpus": expert}, trainer={"num_gpus": trainer})
    assert layout.trainer is not None and layout.home is not None
    assert len(layout.experts) == at_a_time
    assert {seat.gpus for seat in layout.experts} == {expert}
    assert (layout.trainer.gpus, layout.home.gpus) == (trainer, home)


@pytest.mark.parametrize(
    ("gpus", "expert", "trainer", "at_a_time", "home"),
    [
        (1, 0.1, 0.5, 5, 0.5),
        (2, 0.1, 1, 10, 1),
        (3, 0.3, 0.7, 7, 0.7),
        (2, 0.6, 0.25, 2, 0.25),
        (2, 0.6, 2, 2, 2),
        (1, 0.2, 1, 5, 1),
        (2, 0.5, 0.6, 2, 0.6),
        (1, 0.6, 0.5, 1, 0.6),
    ],
)
def test_fractions_of_gpus_fit_as_ray_counts_them(
    plan: Plan, gpus: int, expert: float, trainer: float, at_a_time: int, home: float
) -> None:
    """In parts of single GPUs: 0.1 ten times, 0.6 once each."""
    layout = laid_out(
        plan, cluster_of((16, gpus)), 20, expert={"num_gpus": expert}, trainer={"num_gpus": trainer}, shards=1
    )
    assert layout.home is not None
    assert (len(layout.experts), layout.home.gpus) == (at_a_time, home)


@pytest.mark.parametrize(
    ("nodes", "each", "experts", "at_home"),
    [
        ([(16, 8)], (1, 1), 8, 1),
        ([(16, 8)], (1, 1), 7, 0),
        ([(16, 8)], (1, 4), 9, 4),
        ([(16, 8)], (1, 4), 6, 2),
        ([(8, 2), (8, 2)], (1, 1), 9, 1),
        ([(8, 2)], (2, 1), 9, 0),
        ([(8, 1)], (1, 1), 9, 0),
        ([(8, 0), (8, 0)], (0, 0), 9, 0),
    ],
)
def test_decomposed_task_vectors_lend_the_gpus_of_the_trainer_to_experts(
    plan: Plan, nodes: list[tuple[float, float]], each: tuple[float, float], experts: int, at_home: int
) -> None:
    """Nothing can be learned before the last expert has ended."""
    given = config(experts, expert={"num_gpus": each[0]}, trainer={"num_gpus": each[1]})
    layouts = {}
    for kind in ("whole", "orthogonal"):
        parameters = given.parameters.model_copy(update={"task_vectors": kind})
        planned = given.model_copy(update={"parameters": parameters})
        planned_plan = replace(plan, config=planned, experts=tuple(plan.experts[:1]) * experts)
        layouts[kind] = lay_out(cluster_of(*nodes), planned_plan, Devices.of(cluster_of(*nodes), planned))
    whole, layout = layouts["whole"], layouts["orthogonal"]
    assert layout.at_home == at_home and whole.at_home == 0
    beside = layout.experts[: len(layout.experts) - at_home]
    assert beside == whole.experts and layout.reserved == whole.reserved
    assert layout.home is not None
    lent = layout.experts[len(beside) :]
    assert sum(seat.gpus for seat in lent) <= layout.home.gpus and sum(seat.cpus for seat in lent) <= layout.home.cpus
    assert {seat.node for seat in lent} <= {layout.home.node}
    assert layout.overlap == (whole.overlap and not at_home)


def test_several_gpus_an_actor_are_those_of_one_node(plan: Plan) -> None:
    nodes = cluster_of((8, 1), (8, 4), (8, 2))
    layout = laid_out(plan, nodes, 5, expert={"num_gpus": 2}, trainer={"num_gpus": 2})
    assert layout.trainer is not None and layout.trainer.node in ("n1", "n2")
    assert len(layout.experts) == 2 and all(seat.gpus == 2 for seat in layout.experts)
    with refused(ClusterError, facts=["trainer", "8 GPUs", "3 nodes", "7 GPUs", "4"]):
        laid_out(plan, nodes, 5, trainer={"num_gpus": 8})


def test_labels_are_honoured(plan: Plan) -> None:
    fast, slow = {"pool": "fast", "zone": "a"}, {"pool": "slow", "zone": "a"}
    nodes = [Node(8, 1, id="n0", labels=slow), Node(8, 1, id="n1", labels=fast), Node(8, 1, id="n2")]
    layout = laid_out(plan, nodes, trainer={"labels": {"pool": "fast"}}, expert={"labels": {"pool": "slow"}})
    assert layout.trainer is not None
    assert (layout.trainer.node, [seat.node for seat in layout.experts]) == ("n1", ["n0"])
    assert {seat.node for seat in layout.shards} == {"n0", "n1", "n2"}
    layout = laid_out(plan, nodes, labels={"zone": "a"})
    assert {seat.node for seat in (*layout.shards, *layout.experts)} == {"n0", "n1"}
    with refused(ClusterError, facts=["trainer", "pool=huge"]) as failed:
        laid_out(plan, nodes, trainer={"labels": {"pool": "huge"}})
    assert failed.value.exit_code == 3


@pytest.mark.parametrize(
    ("nodes", "shards", "counts"),
    [
        ([(8, 0)], "auto", {"n0": 1}),
        ([(8, 1), (8, 1), (8, 1)], "auto", {"n0": 1, "n1": 1, "n2": 1}),
        ([(0, 0), (8, 1), (8, 1)], "auto", {"n1": 1, "n2": 1}),
        ([(8, 0)], 5, {"n0": 5}),
        ([(0, 0), (8, 1), (8, 1)], 8, {"n1": 4, "n2": 4}),
    ],
)
def test_shards_are_as_many_as_asked_for_or_one_a_node_that_has_cpus(
    plan: Plan, nodes: list[tuple[float, float]], shards: str | int, counts: dict[str, int]
) -> None:
    for seats in (
        laid_out(plan, cluster_of(*nodes), shards=shards).shards,
        lay_out_shards(cluster_of(*nodes), replace(plan, config=config(shards=shards))).shards,
    ):
        assert Counter(seat.node for seat in seats) == counts
        assert all(0 < seat.cpus <= 1 for seat in seats)


def test_a_single_shard_reads_and_writes_for_a_trainer_that_has_the_task_vectors(plan: Plan) -> None:
    nodes = cluster_of((8, 1), (8, 1))
    within = {shards: laid_out(plan, nodes, shards=shards).within_trainer for shards in ("auto", 0, 1, 2)}
    assert within == {"auto": False, 0: True, 1: False, 2: False}


def test_shards_are_spread_by_bytes_for_the_memory_of_the_nodes(plan: Plan) -> None:
    nodes = [Node(8, 0, memory=3e9, id="large"), Node(8, 0, memory=1e9, id="small")]
    seats = laid_out(plan, nodes, shards=8).shards
    bytes_of = Counter[str]()
    for seat, names in zip(seats, slices(plan, 8), strict=True):
        bytes_of[seat.node] += sum(plan.numels[name] for name in names)
    share = bytes_of["large"] / bytes_of.total()
    assert 0.6 < share < 0.9, "about three quarters of the bytes"


def test_shards_stay_on_the_trainers_node_where_the_scaling_model_says_so(plan: Plan) -> None:
    layout = laid_out(plan, cluster_of((8, 1), (8, 1), (8, 1)), where="node", shards=4)
    assert layout.trainer is not None
    assert {seat.node for seat in layout.shards} == {layout.trainer.node}


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 64])
def test_one_node_is_never_asked_for_more_than_it_has(plan: Plan, cpus: int, gpus: int) -> None:
    for experts, shards in product([1, 2, 5, 9], ["auto", 0, 1, 2, 3, 5, 7, 8]):
        layout = laid_out(plan, cluster_of((cpus, gpus)), experts, shards=shards)
        for seats in asked_at_once(layout):
            assert totals(seats)["n0"][0] <= cpus and totals(seats)["n0"][1] <= gpus, (experts, shards, layout)


@given(
    nodes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=5),
    experts=st.integers(1, 9),
    shards=st.sampled_from(["auto", 0, 1, 3, 7]),
    each=st.tuples(st.sampled_from(["auto", 0, 0.5, 1, 2]), st.sampled_from(["auto", 0, 0.5, 1, 2])),
)
def test_any_cluster_gets_a_layout_that_it_can_hold_or_the_reason_why_not(
    plan: Plan, nodes: list[tuple[float, float]], experts: int, shards: Any, each: tuple[Any, Any]
) -> None:
    options = {"shards": shards, "trainer": {"num_gpus": each[0]}, "expert": {"num_gpus": each[1]}}
    there = cluster_of(*nodes)
    wanted = max((0 if gpus == "auto" else gpus) for gpus in each)
    if not any(node.cpus and node.gpus >= wanted for node in there):
        with refused(ClusterError):
            laid_out(plan, there, experts, **options)
        return
    layout = laid_out(plan, there, experts, **options)
    assert layout == laid_out(plan, there[::-1], experts, **options), "independent of the order of the nodes"
    assert 1 <= len(layout.experts) <= experts
    assert not any(seat.gpus for seat in layout.shards)
    for seats in asked_at_once(layout):
        for node, (cpus, gpus) in totals(seats).items():
            has = there[int(node[1:])]
            assert cpus <= has.cpus and gpus <= has.gpus
    assert layout.trainer is not None
    if layout.overlap and not layout.trainer.gpus:
        assert layout.trainer.node not in {seat.node for seat in layout.experts}


def test_a_run_keeps_its_kind_of_device_when_the_gpus_are_gone(plan: Plan) -> None:
    before = Devices.of(cluster_of((8, 1)), plan.config)
    assert before == Devices(1, 1, threads=8, kinds=("",), batch_tokens=4096)
    assert Devices.of(cluster_of((8, 0)), plan.config) == Devices(0, 0, threads=8)
    with refused(ClusterError, facts=["trainer", "1 GPU"]):
        arrange(cluster_of((8, 0)), plan, WORK, before)


def test_a_run_keeps_its_type_of_gpu_and_its_threads(plan: Plan) -> None:
    def node(number: int, cpus: float, gpus: float, kind: str) -> Node:
        return Node(cpus, gpus, 1e10, f"n{number}", {"ray.io/accelerator-type": kind} if kind else {})

    began = [node(0, 4, 0, ""), node(1, 64, 8, "H100"), node(2, 64, 8, "H100")]
    devices = Devices.of(began, plan.config)
    assert devices == Devices(1, 1, threads=64, kinds=("H100",), batch_tokens=4096)
    later = [node(3, 32, 8, "A100"), *began[:2]]
    assert {seat.node for seat in arrange(devices.among(later), plan, WORK, devices).experts} == {"n1"}
    assert Devices.of(later, plan.config).kinds == ("A100", "H100")
    assert arrange(devices.among(began), plan, WORK, devices).threads == 64
    with refused(ClusterError, do="--fresh", facts=["H100", "A100"]):
        devices.among(later[:1])
    on_cpus = Devices.of(began[:1], plan.config)
    assert on_cpus.threads == 4 and {node.id for node in on_cpus.among(later)} == {node.id for node in later}


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_run_keeps_the_sizes_of_its_passes(llama_merge: Path, gpus: int) -> None:
    nodes = cluster_of((8, gpus))
    for limit, tokens in (("auto", 4096 if gpus else 192), ("100", 100)):
        plan = plan_of(llama_merge, f"batch_tokens={limit}")
        devices = Devices.of(nodes, plan.config)
        layout = arrange(nodes, plan, WORK, devices)
        assert layout.batch_tokens == devices.batch_tokens == tokens
        assert layout.logit_bytes == (1 << 30 if gpus else 32 << 20)
        kept = replace(devices, batch_tokens=17, logit_bytes=3 << 20)
        again = arrange(nodes, plan, WORK, kept)
        assert (again.batch_tokens, again.logit_bytes) == (17, 3 << 20)


def test_a_trainer_that_no_node_holds_is_told_so(plan: Plan) -> None:
    small = [Node(8, 0, memory=1e3, id="n0")]
    with refused(ClusterError, "trainer", "larger node"):
        check_memory(small, plan, WORK, Devices(0, 0))
    check_memory([*small, Node(8, 0, memory=1e10, id="n1")], plan, WORK, Devices(0, 0))
    check_memory(small, plan, WORK, Devices(1, 1))
