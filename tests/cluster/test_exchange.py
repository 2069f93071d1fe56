"""Buckets, what is in flight and what is counted, with shards that stand in for Ray's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cluster.exchange
from cluster.exchange import IN_FLIGHT, RemoteShards, interleaved_buckets
from engine.checkpoint import open_base, open_expert
from engine.codec import pack_all, unpack_all
from engine.coefficients import Coefficients, Layout
from engine.plan import Plan, slices
from engine.task_vectors import LocalShards, TaskVectors

SIZES = {"float32": 4, "bfloat16": 2}


def plan_like(numels: Sequence[int], dtype: str = "float32") -> Any:
    """What the exchange asks of a plan."""
    named = {f"t{i}": numel for i, numel in enumerate(numels)}
    return SimpleNamespace(merged=tuple(named), numels=named, dtype=dtype)


@dataclass
class Line:
    """In place of Ray: answers are made at once and handed out when they are asked for; it counts those between."""

    open: Counter[int] = field(default_factory=Counter)
    most: Counter[int] = field(default_factory=Counter)
    most_together: int = 0
    calls: int = 0

    def ask(self, shard: int, value: Any) -> tuple[int, Any]:
        self.calls += 1
        self.open[shard] += 1
        self.most[shard] = max(self.most[shard], self.open[shard])
        self.most_together = max(self.most_together, self.open.total())
        return shard, value

    def get(self, reference: tuple[int, Any]) -> Any:
        self.open[reference[0]] -= 1
        return reference[1]

    def handles(self, count: int, merge: Callable[..., Any], gradients: Callable[..., Any]) -> list[Any]:
        def handle(shard: int) -> Any:
            def remote(method: Callable[..., Any]) -> Any:
                return SimpleNamespace(remote=lambda *arguments: self.ask(shard, method(*arguments)))

            return SimpleNamespace(merge=remote(merge), gradients=remote(gradients))

        return [handle(shard) for shard in range(count)]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    made = Line()
    monkeypatch.setattr(cluster.exchange, "ray", SimpleNamespace(get=made.get))
    return made


def bucket_bytes(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(cluster.exchange, "BUCKET_BYTES", nbytes)


@settings(deadline=None, max_examples=100)
@given(
    numels=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    shards=st.integers(1, 9),
    limit=st.sampled_from([1, 40, 100, 10**6]),
    dtype=st.sampled_from(sorted(SIZES)),
)
def test_every_merged_tensor_is_in_one_bucket_of_its_shard(
    numels: list[int], shards: int, limit: int, dtype: str
) -> None:
    plan = plan_like(numels, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        bucket_bytes(monkeypatch, limit)
        buckets = list(interleaved_buckets(plan, shards))
    assert all(bucket for _, bucket in buckets)
    for shard, names in enumerate(slices(plan, shards)):
        assert tuple(name for owner, bucket in buckets if owner == shard for name in bucket) == names
    assert Counter(name for _, bucket in buckets for name in bucket) == Counter(plan.merged)
    for _, bucket in buckets:
        assert len(bucket) == 1 or sum(plan.numels[name] for name in bucket) * SIZES[dtype] <= limit


@pytest.mark.parametrize(
    ("dtype", "limit", "buckets"),
    [
        # Slices of 10, 4, 4 and 9, 5, 3, 1 elements.
        ("float32", 10**6, [(0, "0 3 5"), (1, "1 2 4 6")]),
        ("float32", 36, [(0, "0"), (1, "1"), (0, "3 5"), (1, "2 4 6")]),
        ("bfloat16", 28, [(0, "0 3"), (1, "1 2"), (0, "5"), (1, "4 6")]),
        ("float32", 1, [(0, "0"), (1, "1"), (0, "3"), (1, "2"), (0, "5"), (1, "4"), (1, "6")]),
    ],
)
def test_the_shards_take_turns(
    monkeypatch: pytest.MonkeyPatch, dtype: str, limit: int, buckets: list[tuple[int, str]]
) -> None:
    bucket_bytes(monkeypatch, limit)
    wanted = [(shard, tuple(f"t{number}" for number in names.split())) for shard, names in buckets]
    assert list(interleaved_buckets(plan_like([10, 9, 5, 4, 3, 4, 1], dtype), 2)) == wanted


def echo(coefficients: Mapping[str, Any]) -> Any:
    return pack_all({name: torch.full((3,), float(one.values[0, 0])) for name, one in coefficients.items()})


def ones(edges: Mapping[str, tuple[int, ...]], slopes: Mapping[str, Any]) -> Any:
    return {name: np.ones((1, len(edges[name]) - 1)) for name in slopes}


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("sizes", ["even", "one large"])
@pytest.mark.parametrize("direction", ["merge", "gradients"])
def test_each_shard_has_at_most_a_few_buckets_open(
    monkeypatch: pytest.MonkeyPatch, line: Line, direction: str, sizes: str, shards: int
) -> None:
    bucket_bytes(monkeypatch, 40)
    plan = plan_like([10] * 24 if sizes == "even" else [120] + [10] * 24)
    layout = Layout.make(plan.numels, dict.fromkeys(plan.merged, 1))
    remote = RemoteShards(plan, line.handles(shards, echo, ones))
    if direction == "merge":
        remote.merge(Coefficients.constant(layout, [0.5]), lambda name, tensor: None)
    else:
        remote.gradients(layout, lambda name: torch.ones(plan.numels[name]))
    assert line.calls == len(plan.merged) and line.open.total() == 0
    assert line.most_together <= IN_FLIGHT * shards
    assert max(line.most.values()) <= IN_FLIGHT
    assert line.most_together > shards, "a shard has its next bucket before it is done with one"


def test_a_bucket_s_gradients_are_given_up_only_when_it_is_sent(monkeypatch: pytest.MonkeyPatch, line: Line) -> None:
    bucket_bytes(monkeypatch, 40)
    plan = plan_like([10] * 12)
    layout = Layout.make(plan.numels, dict.fromkeys(plan.merged, 1))
    taken_before: list[int] = []

    def take(name: str) -> Tensor:
        taken_before.append(line.calls)
        return torch.ones(10)

    RemoteShards(plan, line.handles(2, echo, ones)).gradients(layout, take)
    assert taken_before == list(range(12))


@pytest.fixture(scope="module")
def plans(llama_merge: Path) -> dict[str, Plan]:
    return {dtype: plan_of(llama_merge, f"dtype={dtype}") for dtype in SIZES}


def task_vectors_of(plan: Plan) -> TaskVectors:
    experts = [(expert.name, open_expert(expert)) for expert in plan.experts]
    return TaskVectors(open_base(plan), experts, getattr(torch, plan.dtype), threads=1)


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("shards", [1, 3, 40])
def test_remote_shards_are_local_ones_with_every_byte_counted(
    monkeypatch: pytest.MonkeyPatch, line: Line, plans: dict[str, Plan], dtype: str, shards: int
) -> None:
    bucket_bytes(monkeypatch, 10_000)
    plan = plans[dtype]
    streams = task_vectors_of(plan)
    layout = Layout.make(plan.numels, {name: i % 4 for i, name in enumerate(plan.merged)})
    generator = np.random.default_rng(0)
    table = Coefficients(layout, generator.uniform(0.1, 0.9, (len(plan.experts), layout.width)))
    slopes = {
        name: torch.from_numpy(generator.normal(size=plan.base_header.tensors[name].shape)).to(getattr(torch, dtype))
        for name in plan.merged
    }

    def merge(coefficients: Mapping[str, Any]) -> Any:
        return pack_all(streams.merge(coefficients))

    def gradients(edges: Mapping[str, tuple[int, ...]], packed: Mapping[str, Any]) -> Any:
        return streams.gradients(edges, unpack_all(packed))

    remote, local = RemoteShards(plan, line.handles(shards, merge, gradients)), LocalShards(streams)
    assert remote.traffic() == {"bytes_to_shards": 0, "bytes_from_shards": 0}

    received: list[dict[str, Tensor]] = [{}, {}]
    remote.merge(table, received[0].__setitem__)
    local.merge(table, received[1].__setitem__)
    assert received[0].keys() == received[1].keys() == set(plan.merged)
    for name, tensor in received[0].items():
        assert tensor.dtype == getattr(torch, dtype) and torch.equal(tensor, received[1][name])
    assert remote.traffic() == {"bytes_to_shards": 0, "bytes_from_shards": plan.merged_bytes}

    found = remote.gradients(layout, slopes.__getitem__)
    assert found.shape == (len(plan.experts), layout.width)
    np.testing.assert_array_equal(found, local.gradients(layout, slopes.__getitem__))
    assert remote.traffic() == {"bytes_to_shards": plan.merged_bytes, "bytes_from_shards": plan.merged_bytes}
    assert plan.merged_bytes == sum(plan.numels.values()) * SIZES[dtype]


def test_what_a_step_moves_does_not_depend_on_experts_shards_or_buckets(
    monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    moved = set()
    for experts, shards, limit in [(1, 1, 10**6), (7, 3, 100), (2, 12, 1)]:
        bucket_bytes(monkeypatch, limit)
        plan = plan_like(range(1, 20))
        layout = Layout.make(plan.numels, dict.fromkeys(plan.merged, 2))

        def merge(coefficients: Mapping[str, Any], numels: Mapping[str, int] = plan.numels) -> Any:
            return pack_all({name: torch.zeros(numels[name]) for name in coefficients})

        remote = RemoteShards(plan, line.handles(shards, merge, ones))
        remote.merge(Coefficients.constant(layout, [0.5] * experts), lambda name, tensor: None)
        remote.gradients(layout, lambda name, numels=plan.numels: torch.ones(numels[name]))  # type: ignore[misc]
        moved.add(tuple(remote.traffic().values()))
    assert moved == {(190 * 4, 190 * 4)}
