"""Shards in the trainer's process: merged tensors, gradients, and the limit on bytes in flight."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import LONG, begun, cut_small, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import Received, task_vectors
from tolerance import assert_within, bound, unit
from torch import Tensor

import engine.shards.local_shards
from engine.errors import CheckpointError
from engine.planning.plan import Plan, in_order_of_use
from engine.shards.local_shards import LocalShards
from engine.shards.protocol import Gradients, InFlightLimit, coefficient_gradient
from engine.task_vectors.coefficients import ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.transfers import Fetch, to_cpu


@pytest.fixture(params=["float32", "bfloat16"])
def plan(llama_merge: Path, request: pytest.FixtureRequest) -> Plan:
    return plan_of(llama_merge, f"dtype={request.param}")


@pytest.fixture(params=[(100, 300), None], ids=["small-pieces", "whole"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        cut_small(monkeypatch, *request.param)


# Streams and model run concurrently, or in turns.
both = pytest.mark.parametrize("overlap", [False, True], ids=["in-turns", "together"])


def table_of(plan: Plan) -> Coefficients:
    # Not in the order in which the model uses the tensors.
    numels = dict(reversed(plan.numels.items()))
    layout = ChunkLayout.make(numels, {name: i % 4 for i, name in enumerate(plan.merged)})
    return Coefficients(layout, np.random.default_rng(0).uniform(0.1, 0.9, (len(plan.experts), layout.width)))


def slopes_of(plan: Plan, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = {name: plan.base_header.tensors[name].shape for name in plan.merged}
    return {name: torch.randn(shape).to(getattr(torch, plan.dtype)) for name, shape in shapes.items()}


def dense(plan: Plan) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the base's merged tensors [N] and the task vectors [K, N], in float64."""
    folders = [plan.base_header.folder, *(expert.header.folder for expert in plan.experts)]
    base, *experts = (safetensors.torch.load_file(folder / "model.safetensors") for folder in folders)
    flat = {name: base[name].double().numpy().ravel() for name in plan.merged}
    return flat, {n: np.stack([e[n].double().numpy().ravel() - flat[n] for e in experts]) for n in plan.merged}


def collected(shards: LocalShards, layout: ChunkLayout, slopes: dict[str, Tensor]) -> np.ndarray:
    leaving = shards.gradients(layout)
    for name, slope in slopes.items():
        leaving.send(name, slope)
    return leaving.collect()


@both
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_merged_tensor_arrives_once_and_is_the_plain_sum(plan: Plan, threads: int, overlap: bool) -> None:
    table, received = table_of(plan), Received(plan)
    arrivals = LocalShards(plan, threads, overlap).merge(table, received)
    assert list(arrivals) == in_order_of_use(plan.merged), "first what the model needs first"
    assert overlap or all(future.done() for futures in arrivals.values() for future in futures)
    found = received.all_of(arrivals)
    wanted_pieces = [piece for name in plan.merged for piece in pieces(name, plan.base_header.tensors[name].shape)]
    assert sorted(map(repr, received.pieces)) == sorted(map(repr, wanted_pieces))
    base, tau = dense(plan)
    rounding = unit(torch.bfloat16) if plan.dtype == "bfloat16" else 0.0  # of the float32 sum, once
    for name in plan.merged:
        wanted, exact = table.of(name), base[name].copy()
        terms = [
            np.repeat(row.astype(np.float64), np.diff(wanted.edges)) * one
            for row, one in zip(wanted.values, tau[name], strict=True)
        ]
        exact += sum(terms)
        # Each term takes a difference and a product, and there is one addition per term.
        error = bound(len(terms) + 2, 1) * (np.abs(base[name]) + np.abs(terms).sum(axis=0))
        assert_within(found[name].double(), exact, error + rounding * found[name].double().abs().numpy(), name)
        whole = dict.fromkeys(pieces(name, plan.base_header.tensors[name].shape), wanted)
        assert torch.equal(found[name], torch.cat(list(task_vectors(plan).merge_all(whole).values())))


@both
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_are_the_plain_sums_in_the_layout_s_columns(plan: Plan, threads: int, overlap: bool) -> None:
    layout, slopes = table_of(plan).layout, slopes_of(plan)
    shards = LocalShards(plan, threads, overlap)
    found = collected(shards, layout, slopes)
    assert found.shape == (2, layout.width) and found.dtype == np.float64
    _, tau = dense(plan)
    for name, edges in layout.edges_of.items():
        products = slopes[name].double().numpy().ravel() * tau[name]
        exact = np.stack([products[:, start:stop].sum(axis=1) for start, stop in pairwise(edges)], axis=1)
        np.testing.assert_allclose(found[:, layout.columns[name]], exact, rtol=1e-4, atol=1e-4)
    backwards = dict(reversed(slopes.items()))
    np.testing.assert_array_equal(collected(LocalShards(plan, 1, overlap=False), layout, backwards), found)
    assert shards.traffic() == {"bytes_to_shards": 0, "bytes_from_shards": 0}


@both
@pytest.mark.usefixtures("small_blocks")
def test_gradients_sent_several_times_add_up(plan: Plan, overlap: bool) -> None:
    layout, shards = table_of(plan).layout, LocalShards(plan, 2, overlap)
    first, second = slopes_of(plan, 1), slopes_of(plan, 2)
    leaving = shards.gradients(layout)
    for slopes in (first, second):
        for name, slope in slopes.items():
            leaving.send(name, slope)
    apart = collected(shards, layout, first) + collected(shards, layout, second)
    np.testing.assert_allclose(leaving.collect(), apart, rtol=1e-12, atol=1e-12)


def test_tensors_that_are_never_sent_have_no_gradient(plan: Plan) -> None:
    layout, name = table_of(plan).layout, plan.merged[3]
    found = collected(LocalShards(plan, 1, overlap=False), layout, {name: slopes_of(plan)[name]})
    here = np.zeros(layout.width, dtype=bool)
    here[layout.columns[name]] = True
    assert found[:, here].all() and not found[:, ~here].any()


def test_the_gradient_is_that_of_the_merge(llama_merge: Path) -> None:
    """The merge is linear in α, so ⟨G, θ(α + ε) − θ(α)⟩ = Σ ε · ∂L/∂α."""
    plan = plan_of(llama_merge)
    shards, start, slopes = LocalShards(plan, 1, overlap=False), table_of(plan), slopes_of(plan)
    step = np.random.default_rng(1).uniform(-1, 1, start.values.shape)

    def loss(table: Coefficients) -> float:
        received = Received(plan)
        tensors = received.all_of(shards.merge(table, received))
        return sum((tensors[name].double() * slope.reshape(-1)).sum().item() for name, slope in slopes.items())

    moved = loss(Coefficients(start.layout, start.values + step)) - loss(start)
    assert moved == pytest.approx((collected(shards, start.layout, slopes) * step).sum(), rel=1e-4)


@both
def test_files_are_opened_at_the_first_call(llama_merge: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    def fault(*_: object) -> None:
        raise CheckpointError("unreadable")

    monkeypatch.setattr(engine.shards.local_shards, "open_task_vectors", fault)
    shards = LocalShards(plan_of(llama_merge), 1, overlap)
    with pytest.raises(CheckpointError, match="unreadable"):
        shards.gradients(table_of(plan_of(llama_merge)).layout)


@both
def test_an_error_of_a_merge_or_a_gradient_is_raised(
    llama_merge: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    plan = plan_of(llama_merge)
    shards, table = LocalShards(plan, 2, overlap), table_of(plan)
    received = Received(plan)
    del received.tensors[plan.merged[4]]
    with pytest.raises(KeyError, match=plan.merged[4]):
        received.all_of(shards.merge(table, received))

    def fetch(start: int, stop: int) -> AbstractContextManager[Tensor]:
        raise RuntimeError("lost")

    leaving = shards.gradients(table.layout)
    monkeypatch.setattr(engine.shards.local_shards, "to_cpu", lambda gradient: fetch)
    leaving.send(plan.merged[0], torch.ones(1))
    with pytest.raises(RuntimeError, match="lost"):
        leaving.collect()


@both
def test_send_blocks_until_the_limit_admits_the_gradient(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    slopes, names = slopes_of(plan), plan.merged[:2]
    nbytes = [slopes[name].nbytes for name in names]
    monkeypatch.setattr(engine.shards.local_shards, "WINDOW_BYTES", sum(nbytes) - 1)
    leaving, go = LocalShards(plan, 2, overlap).gradients(table_of(plan).layout), threading.Event()

    def arriving(gradient: Tensor) -> Fetch:
        def fetch(start: int, stop: int) -> AbstractContextManager[Tensor]:
            assert go.wait(LONG)
            return to_cpu(gradient)(start, stop)

        return fetch

    monkeypatch.setattr(engine.shards.local_shards, "to_cpu", arriving)
    leaving.send(names[0], slopes[names[0]])
    second = begun(lambda: leaving.send(names[1], slopes[names[1]]))
    assert not second.done(), "the limit does not admit both"
    go.set()
    second.result(LONG)
    assert leaving.collect().any()


@both
def test_several_threads_may_send(llama_merge: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """The backward pass of a model on several GPUs has a thread for each."""
    plan = plan_of(llama_merge)
    layout, slopes = table_of(plan).layout, slopes_of(plan)
    shards = LocalShards(plan, 2, overlap)
    wanted = collected(shards, layout, slopes)
    before = sys.getswitchinterval()
    monkeypatch.setattr(engine.shards.local_shards, "WINDOW_BYTES", 3 * max(plan.numels.values()) * 4)
    try:
        sys.setswitchinterval(1e-6)
        for _ in range(20):
            leaving, together = shards.gradients(layout), threading.Barrier(2)

            def send(names: tuple[str, ...], leaving: Gradients = leaving, begin: threading.Barrier = together) -> None:
                begin.wait(LONG)
                for name in names:
                    leaving.send(name, slopes[name])

            for sending in [begun(lambda half=half: send(plan.merged[half::2])) for half in range(2)]:
                sending.result(LONG)
            np.testing.assert_array_equal(leaving.collect(), wanted)
    finally:
        sys.setswitchinterval(before)


@both
def test_a_gradient_larger_than_the_limit_is_sent(
    llama_merge: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    cut_small(monkeypatch, block=100, piece=300)
    plan = plan_of(llama_merge)
    layout, slopes = table_of(plan).layout, slopes_of(plan)
    free = collected(LocalShards(plan, 1, overlap=False), layout, slopes)
    monkeypatch.setattr(engine.shards.local_shards, "WINDOW_BYTES", 1)
    confined = begun(lambda: collected(LocalShards(plan, 2, overlap), layout, slopes)).result(LONG)
    np.testing.assert_array_equal(confined, free)


@both
def test_gradients_held_never_exceed_the_limit(
    llama_merge: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    plan = plan_of(llama_merge)
    limit = 3 * max(plan.numels.values()) * 4
    monkeypatch.setattr(engine.shards.local_shards, "WINDOW_BYTES", limit)
    leaving, held = LocalShards(plan, 2, overlap).gradients(table_of(plan).layout), []

    def alive() -> int:
        return sum(tensor.nbytes for tensor in (one() for one in held) if tensor is not None)

    for name in [*plan.merged, *plan.merged]:
        slope = torch.ones(plan.base_header.tensors[name].shape)
        held.append(weakref.ref(slope))
        leaving.send(name, slope)
        del slope
        # A thread may release the gradient a moment after its future is done.
        deadline = time.monotonic() + LONG
        while alive() > limit and time.monotonic() < deadline:
            time.sleep(1e-3)
        assert alive() <= limit
    assert sum(plan.numels.values()) * 4 > 2 * limit
    assert leaving.collect().any()


def test_the_model_may_compute_while_the_streams_run(llama_merge: Path) -> None:
    """With `overlap`, `merge` and `send` return before their work is done."""
    plan = plan_of(llama_merge)
    table, received, go = table_of(plan), Received(plan), threading.Event()
    put, shards = received.put, LocalShards(plan, 1, overlap=True)

    def late(piece: Piece, merged_N: Tensor) -> None:
        assert go.wait(LONG)
        put(piece, merged_N)

    received.put = late
    arrivals = begun(lambda: shards.merge(table, received)).result(LONG)
    assert not any(future.done() for futures in arrivals.values() for future in futures)
    leaving, name = shards.gradients(table.layout), plan.merged[0]
    begun(lambda: leaving.send(name, slopes_of(plan)[name])).result(LONG)
    go.set()
    assert not any(tensor.isnan().any() for tensor in received.all_of(arrivals).values())
    assert leaving.collect().any()


@settings(deadline=None, max_examples=15)
@given(
    limit=st.integers(1, 50),
    sizes=st.lists(st.lists(st.integers(1, 80), min_size=1, max_size=12), min_size=1, max_size=4),
)
def test_the_limit_admits_at_most_its_bytes_or_one_larger_item(limit: int, sizes: list[list[int]]) -> None:
    window, lock, inside, seen = InFlightLimit(limit), threading.Lock(), [], []
    together = threading.Barrier(len(sizes))

    def pass_through(own_sizes: list[int]) -> None:
        together.wait(LONG)
        for size in own_sizes:
            window.enter(size)
            with lock:
                inside.append(size)
                seen.append(list(inside))
            time.sleep(1e-4)
            with lock:
                inside.remove(size)
            window.leave(size)

    for future in [begun(lambda some=some: pass_through(some)) for some in sizes]:
        future.result(LONG)
    assert len(seen) == sum(map(len, sizes))
    assert all(sum(some) <= limit or len(some) == 1 for some in seen)


def test_the_limit_admits_items_that_fit_and_blocks_others() -> None:
    window = InFlightLimit(10)
    for size in (4, 5, 1):
        begun(lambda size=size: window.enter(size)).result(LONG)
    fourth = begun(lambda: window.enter(3))
    assert not fourth.done()
    window.leave(1)
    wait([fourth], timeout=0.05)
    assert not fourth.done(), "one is not enough"
    window.leave(4)
    fourth.result(LONG)
    larger = begun(lambda: window.enter(11))
    window.leave(5)
    wait([larger], timeout=0.05)
    assert not larger.done(), "3 are still inside"
    window.leave(3)
    larger.result(LONG)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 3), st.integers(0, 99))
def test_parts_of_the_gradient_are_added_in_their_columns(tensors: list[int], experts: int, seed: int) -> None:
    numels = {"a": 7, "b": 1, "c": 12, "d": 5, "e": 3}
    layout = ChunkLayout.make(numels, {"a": 3, "b": 0, "c": 4, "d": 1, "e": 2})
    generator = np.random.default_rng(seed)
    names = [list(numels)[i] for i in tensors]
    parts = [(name, generator.normal(size=(experts, len(layout.edges_of[name]) - 1))) for name in names]
    found = coefficient_gradient(layout, experts, iter(parts))
    assert found.shape == (experts, layout.width) and found.dtype == np.float64
    for name in numels:
        of_tensor = [part for owner, part in parts if owner == name]
        # Added in order, so the bits are those of a sum from left to right.
        wanted = list(accumulate(of_tensor, initial=np.zeros((experts, len(layout.edges_of[name]) - 1))))[-1]
        np.testing.assert_array_equal(found[:, layout.columns[name]], wanted)


def test_the_gradient_of_nothing_is_zero() -> None:
    layout = ChunkLayout.make({"a": 7, "b": 2}, {"a": 3, "b": 1})
    np.testing.assert_array_equal(coefficient_gradient(layout, 2, []), np.zeros((2, 4)))


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads, "only the pool's own threads are set to one"
