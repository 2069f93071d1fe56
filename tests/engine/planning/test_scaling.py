"""The scaling model: dependence on K, the choice of placement, and the refusal of merges that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import plan_of
from errors import refused

from cluster.placement import Devices, arrange, check_memory, lay_out, machines
from cluster.seats import Node
from engine.config.resources import Cluster
from engine.errors import ClusterError
from engine.planning.costs.fitting import shortages
from engine.planning.costs.flops import SVD_FLOPS, sample_flops
from engine.planning.costs.rates import CORE_FLOPS, DISK, GB, GPU_DECOMPOSING, PINNED
from engine.planning.costs.scaling import Machines, Work, choose, predict
from engine.planning.factors import factor_bytes
from engine.planning.plan import Plan
from engine.planning.schedule import pass_limit
from engine.sizes import gpu_logit_bytes

WORK = Work(tokens=64, samples=16, steps=2, passes=2, pass_tokens=256)
NO_GPUS = Devices(0, 0)
ONE = Machines(nodes=1, cpus=2, gpus=0, memory=24 * GB)


@pytest.fixture
def plans(make_merge: Callable[..., Path]) -> list[Plan]:
    """Return the plans of the same merge with two and with four experts."""
    config = make_merge(experts=4)
    four = plan_of(config)
    return [replace(four, experts=four.experts[:2]), four]


def larger(plan: Plan, factor: int) -> Plan:
    """Return the plan with `factor` times as many rows in every tensor of base and experts."""

    def grown(model):
        tensors = {
            name: replace(tensor, shape=(tensor.shape[0] * factor, *tensor.shape[1:]))
            for name, tensor in model.header.tensors.items()
        }
        return replace(model, header=replace(model.header, tensors=tensors))

    return replace(plan, base=grown(plan.base), experts=tuple(grown(expert) for expert in plan.experts))


@pytest.mark.parametrize("where", ["trainer", "node", "nodes"])
def test_only_streaming_and_the_page_cache_know_k(plans: list[Plan], where) -> None:
    cluster = Machines(nodes=4, cpus=8, gpus=1, memory=64 * GB, gpu_memory=80 * GB)
    # So large that the time to open tensors is negligible.
    plans = [larger(plan, 1_000_000) for plan in plans]
    two, four = (predict(plan, WORK, cluster, where) for plan in plans)
    assert two.memory == replace(four.memory, page_cache=two.memory.page_cache)
    assert two.moved == four.moved == (0 if where == "trainer" else 2 * plans[0].merged_bytes)
    assert four.memory.page_cache == pytest.approx(two.memory.page_cache * 5 / 3)
    assert four.step.stream == pytest.approx(two.step.stream * 6 / 4, rel=1e-3)
    assert two.step.compute == four.step.compute


def test_a_streamed_gradient_moves_once_a_pass_and_is_not_held(make_merge: Callable[..., Path]) -> None:
    config = make_merge()
    kept, streamed = (larger(plan_of(config, f"gradients={how}"), 10_000) for how in ("accumulate", "stream"))
    one, other = (predict(plan, WORK, ONE, "node") for plan in (kept, streamed))
    assert other.moved == one.moved / 2 * (WORK.passes + 1)
    assert other.memory.trainer < one.memory.trainer


def test_orthogonal_task_vectors_cost_decompositions_once_and_nothing_a_step(make_merge: Callable[..., Path]) -> None:
    config = make_merge()
    kinds = ("orthogonal", "whole")
    plans = [plan_of(config, f"parameters.task_vectors={kind}", "cluster.factors=never") for kind in kinds]
    shapes = [plans[0].base_header.tensors[name].shape for name in plans[0].merged]
    # Two experts' matrices, and two matrices of as many columns as their smaller side has rows.
    flops = SVD_FLOPS * sum(2 * m * n * min(m, n) + (m + n) * min(m, n) ** 2 for m, n in shapes)
    for gpus, rate in ((0, CORE_FLOPS * 24), (1, GPU_DECOMPOSING * 3)):
        cluster = Machines(nodes=3, cpus=8, gpus=gpus)
        one, other = (predict(plan, WORK, cluster, "nodes") for plan in plans)
        assert one.step == other.step
        assert one.memory == replace(other.memory, shard=one.memory.shard, expert=one.memory.expert)
        wanted = flops / rate + 2 * plans[0].merged_bytes / DISK
        assert one.run_seconds - other.run_seconds == pytest.approx(wanted, rel=1e-3)


def test_factors_that_a_gpu_has_no_room_for_are_copied_in_each_pass(make_merge: Callable[..., Path]) -> None:
    plan = larger(plan_of(make_merge(), "parameters.task_vectors=orthogonal"), 10_000)
    room = replace(ONE, gpus=1)
    whole = predict(plan, WORK, room, "trainer")
    held = factor_bytes(plan, plan.orthogonal) + plan.merged_bytes
    small = replace(room, gpu_memory=whole.memory.trainer - held / 2)
    tight = predict(plan, WORK, small, "trainer")
    assert shortages(plan, WORK, tight, small) == []
    assert whole.memory.copied == 0 < tight.memory.copied < held
    assert tight.memory.trainer == pytest.approx(whole.memory.trainer - tight.memory.copied)
    assert tight.step.compute - whole.step.compute == pytest.approx(2 * tight.memory.copied / PINNED)


def test_a_cpu_waits_for_everything_and_a_gpu_only_for_what_is_longer(plans: list[Plan]) -> None:
    on_cpu = predict(plans[1], WORK, ONE, "node").step
    assert on_cpu.total == pytest.approx(on_cpu.compute + on_cpu.stream + on_cpu.exchange)
    on_gpu = predict(plans[1], WORK, replace(ONE, gpus=1), "node").step
    assert on_gpu.compute <= on_gpu.total <= on_gpu.compute + on_gpu.stream + on_gpu.exchange


def test_one_small_node_streams_within_the_trainer(plans: list[Plan]) -> None:
    assert choose(plans[1], WORK, ONE).where == "trainer"


def test_many_experts_are_streamed_on_all_nodes_where_the_network_is_quick(plans: list[Plan]) -> None:
    many = larger(replace(plans[1], experts=plans[1].experts * 16), 10_000)
    cluster = Machines(nodes=4, cpus=8, gpus=0, memory=640 * GB)
    quick, slow = (
        replace(many, config=many.config.model_copy(update={"cluster": _at(many, network)}))
        for network in (100.0, 0.01)
    )
    assert choose(quick, WORK, cluster).where == "nodes" and choose(slow, WORK, cluster).where == "trainer"


def _at(plan: Plan, network: float):
    rates = plan.config.cluster.rates.model_copy(update={"network_gbs": network})
    return plan.config.cluster.model_copy(update={"rates": rates})


def test_a_number_of_shards_is_taken_at_its_word(make_merge: Callable[..., Path]) -> None:
    config = make_merge()
    for given, where, shards in ((0, "trainer", 1), (1, "node", 1), (3, "node", 3)):
        chosen = choose(plan_of(config, f"cluster.shards={given}"), WORK, ONE)
        assert (chosen.where, chosen.shards) == (where, shards)
    assert choose(plan_of(config, "cluster.shards=3"), WORK, replace(ONE, nodes=2)).where == "nodes"


def test_rates_are_the_users(make_merge: Callable[..., Path]) -> None:
    config = make_merge()
    slow, quick = (
        predict(plan_of(config, *(f"cluster.rates.{name}={rate}" for name in RATES)), WORK, ONE, "node").step
        for rate in (1e-9, 2e-9)  # so slow that constant times are negligible
    )
    for part in ("compute", "stream", "exchange", "total"):
        assert getattr(slow, part) == pytest.approx(2 * getattr(quick, part))


@pytest.mark.parametrize(("room", "wanted"), [(9e99, 1024), (1 << 30, 1024), ((1 << 30) - 1, 512), (1, 32), (-5, 32)])
def test_parts_of_logits_on_a_gpu_are_as_large_as_fits(room: float, wanted: int) -> None:
    assert gpu_logit_bytes(room) == wanted << 20


def test_parts_of_logits_depend_on_the_trainer_s_memory(make_merge: Callable[..., Path]) -> None:
    plan, node = plan_of(make_merge()), Machines(nodes=1, cpus=2, gpus=1)
    sizes = [
        predict(plan, WORK, replace(node, gpus=gpus, gpu_memory=memory), "trainer").memory.logit_bytes >> 20
        for gpus, memory in ((0, None), (1, None), (1, 80 * GB), (1, 2 * GB), (1, GB / 100))
    ]
    assert sizes == [32, 1024, 1024, 256, 32]


RATES = ("compute_tflops", "memory_gbs", "stream_gbs", "exchange_gbs")


def test_work_is_counted_as_the_trainer_goes_through_it(make_merge: Callable[..., Path]) -> None:
    config = plan_of(
        make_merge(), "batch_tokens=100", "parameters.gradient_accumulation=4", "parameters.epochs=3"
    ).config
    # Windows of one epoch: 50 30 40 30 and 30 30; passes 50+40, 30+30 and 30+30.
    lengths, counted = [[50, 40, 30], [30]], Work(tokens=37.5, samples=4, steps=5, passes=1.5, pass_tokens=100)
    assert {pass_limit(config, on_gpu, 4, lengths) for on_gpu in (False, True)} == {100}
    assert Work.of(config, lengths, 100) == counted
    auto = config.model_copy(update={"batch_tokens": "auto"})
    longer = [[10 * length for length in lengths[0]], [300]]
    assert [Work.of(auto, longer, pass_limit(auto, on_gpu)).passes for on_gpu in (False, True)] == [3, 1]


def test_the_passes_of_a_window_are_enough_for_the_trainers_that_have_gpus(make_merge: Callable[..., Path]) -> None:
    made, tokens = make_merge(), [[500] * 6] * 2

    def passes(seats: int, *options: str) -> float:
        config = plan_of(
            made, "parameters.task_vectors=orthogonal", "parameters.gradient_accumulation=6", *options
        ).config
        return Work.of(config, tokens, pass_limit(config, True, seats, tokens)).passes

    assert [passes(seats) for seats in (1, 2, 3, 4, 6, 99)] == [1, 2, 3, 3, 6, 6]
    assert [passes(4, f"cluster.trainers={count}") for count in (1, 2, 99)] == [1, 2, 3]
    assert passes(4, "gradients=accumulate") == passes(4, "parameters.task_vectors=whole") == 1


def test_samples_that_share_a_pass_share_its_cost_and_not_their_activations(plans: list[Plan]) -> None:
    apart, together = (
        predict(plans[0], replace(WORK, passes=passes, pass_tokens=tokens), ONE, "trainer")
        for passes, tokens in ((8, 64), (2, 256))
    )
    assert together.step.compute < apart.step.compute
    assert together.memory.trainer > apart.memory.trainer
    assert together.memory.shard == apart.memory.shard


def test_processes_that_do_not_fit_are_listed_with_advice(plans: list[Plan]) -> None:
    huge = larger(plans[0], 1_000_000)
    cluster = Machines(nodes=1, cpus=2, gpus=1, memory=1 * GB, gpu_memory=1 * GB)
    prediction = predict(huge, WORK, cluster, "trainer")
    trainer, expert, *_, cache = shortages(huge, WORK, prediction, cluster)
    assert f"{prediction.memory.trainer / GB:.1f} GB" in trainer
    assert "larger GPUs" in trainer and "larger GPUs" in expert
    assert "`" not in trainer + expert, "no setting would suffice"
    assert f"{prediction.memory.page_cache / GB:.1f} GB" in cache
    assert shortages(plans[0], WORK, predict(plans[0], WORK, ONE, "trainer"), ONE) == []


def test_a_trainer_that_no_node_holds_is_refused_before_any_actor_starts(plans: list[Plan]) -> None:
    huge, nodes = larger(plans[0], 1_000_000), [Node(2, 0, 24 * GB)]
    with refused(ClusterError, where="the trainer", do="larger node", facts=["GB"]):
        check_memory(nodes, huge, WORK, NO_GPUS)
    check_memory(nodes, plans[0], WORK, NO_GPUS)
    assert arrange(nodes, plans[0], WORK, NO_GPUS).within_trainer


def test_shards_on_one_node_share_a_third_of_it(make_merge: Callable[..., Path]) -> None:
    plan = plan_of(make_merge())
    layout = lay_out([Node(8, 0, id="a"), Node(8, 0, id="b")], plan, NO_GPUS, "node", 6)
    assert len(layout.shards) == 6 and len({seat.node for seat in layout.shards}) == 1
    assert sum(seat.cpus for seat in layout.shards) <= 8 / 3


def test_a_cluster_has_no_more_gpus_than_its_nodes(plans: list[Plan]) -> None:
    nodes = [Node(8, 8, 10 * GB), *(Node(8, 0, 10 * GB) for _ in range(3))]
    estimated = machines(nodes, plans[0].config, Devices(1, 1))
    assert estimated.gpus * estimated.nodes == 8


def test_a_cluster_is_its_smallest_node_as_often_as_there_are_nodes(plans: list[Plan]) -> None:
    nodes = [Node(8, 1, 10 * GB), Node(4, 0, 5 * GB), Node(0, 0, 1 * GB)]
    assert machines(nodes, plans[0].config, Devices(1, 1)) == Machines(2, 4, 0.5, 5 * GB)
    assert machines(nodes, plans[0].config, NO_GPUS) == Machines(2, 4, 0, 5 * GB)


def test_an_actor_of_several_gpus_has_the_memory_of_all_of_them(plans: list[Plan]) -> None:
    huge = larger(plans[0], 100_000)
    gpus = {"trainer": {"num_gpus": 64}, "expert": {"num_gpus": 64}}
    many = replace(huge, config=huge.config.model_copy(update={"cluster": Cluster.model_validate(gpus)}))
    node = Machines(nodes=1, cpus=2, gpus=64, memory=10_000 * GB, gpu_memory=1 * GB)
    trainer, expert, *_ = shortages(huge, WORK, predict(huge, WORK, node, "node"), node)
    assert "`cluster.trainer.num_gpus: " in trainer and "`cluster.expert.num_gpus: " in expert
    assert shortages(many, WORK, predict(many, WORK, node, "node"), node) == []


def test_of_a_mixture_the_experts_that_a_token_meets_compute(make_merge: Callable[..., Path]) -> None:
    plan = plan_of(make_merge(family="mixtral"))
    inside = {name for name in plan.merged if ".experts." in name}
    numel = sum(plan.numels[name] for name in inside)
    assert len(inside) == 3 * 4 * 3 and numel > 0.5 * sum(plan.numels.values())
    config = plan.base_header.config
    dense = replace(
        plan, base=replace(plan.base, header=replace(plan.base_header, config=config | {"num_experts_per_tok": 4}))
    )
    (some, some_backward), (every, every_backward) = sample_flops(plan, 8), sample_flops(dense, 8)
    # Two of the four experts process a token, at two FLOP per weight; the backward pass adds the weight gradient.
    assert every - some == 8 * 2 * numel / 2 and every_backward - some_backward == 8 * 4 * numel / 2
