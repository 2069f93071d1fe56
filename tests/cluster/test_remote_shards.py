"""Remote shards: how pieces are bucketed, how many calls are in flight and which bytes are counted.

Plain objects stand in for Ray's actors.
"""

from __future__ import annotations

import gc
import pickle
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import LONG, begun, cut_small, plan_of
from fake_cuda import fake_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import Plain, Received
from thorough import as_thorough
from torch import Tensor

import cluster.remote_shards
import engine.sizes
from actors.shard import Shard
from actors.trainer import Trainer, WindowSample
from cluster.remote_shards import IN_FLIGHT, RemoteShards
from engine.codec import Packed, pack, pack_all, unpack, unpack_all
from engine.learning.learner import first_stage
from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan, in_order_of_use, slices
from engine.shards.local_shards import LocalShards
from engine.shards.protocol import Shards
from engine.task_vectors.coefficients import ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.transfers import Fetch, to_cpu

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"float32": 4, "bfloat16": 2}


def plan_like(numels: Sequence[int], dtype: str = "float32", experts: int = 1) -> Any:
    """The attributes of a plan that the exchange uses. The order is that of most files: t10 comes before t2."""
    named = dict(sorted((f"t{i}", numel) for i, numel in enumerate(numels)))
    tensors = {name: SimpleNamespace(shape=(numel,)) for name, numel in named.items()}
    header = SimpleNamespace(tensors=tensors)
    return SimpleNamespace(merged=tuple(named), numels=named, dtype=dtype, experts=range(experts), base_header=header)


@dataclass(eq=False)
class Question:
    shard: int
    method: str
    arguments: tuple[Any, ...]
    answer: Callable[[], Any]


@dataclass
class Line:
    """Stands in for Ray, with shards that are as slow as possible.

    A call is answered when its answer is waited for, after the earlier calls of the same shard. Records how many calls
    are open at a time.
    """

    asked: list[Question] = field(default_factory=list)
    open: dict[int, list[Question]] = field(default_factory=lambda: defaultdict(list))
    most: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    most_together: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def ask(self, shard: int, method: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Question:
        # Ray serialises the arguments at the time of the call; later changes to them are not sent.
        sent = pickle.loads(pickle.dumps(arguments, protocol=5))
        question = Question(shard, method, sent, lambda: call(*sent))
        self.asked.append(question)
        self.open[shard].append(question)
        self.most[shard] = max(self.most[shard], len(self.open[shard]))
        self.most_together = max(self.most_together, sum(map(len, self.open.values())))
        return question

    def wait(self, questions: list[Question]) -> None:
        assert self.gate.wait(LONG)
        for question in questions:
            while question in self.open[question.shard]:
                first = self.open[question.shard].pop(0)
                try:
                    answer = first.answer()
                    first.answer = lambda answer=answer: answer
                except Exception as error:  # noqa: BLE001 - raised by `get`
                    first.answer = lambda error=error: throw(error)

    def get(self, question: Question) -> Any:
        self.wait([question])
        return question.answer()

    def handles(self, count: int, merge: Callable[..., Any], gradients: Callable[..., Any]) -> list[Any]:
        def remote(shard: int, method: str, call: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *arguments: self.ask(shard, method, call, arguments))

        return [
            SimpleNamespace(merge=remote(shard, "merge", merge), gradients=remote(shard, "gradients", gradients))
            for shard in range(count)
        ]

    def buckets(self, method: str) -> list[tuple[int, tuple[Piece, ...]]]:
        """The shard and the pieces of each call of the method."""
        return [(one.shard, tuple(one.arguments[0])) for one in self.asked if one.method == method]


def throw(error: Exception) -> None:
    raise error


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    made = Line()
    monkeypatch.setattr(cluster.remote_shards, "ray", SimpleNamespace(get=made.get, wait=made.wait))
    return made


def confine(monkeypatch: pytest.MonkeyPatch, bucket: int, shards: int, piece: int = 10**6) -> None:
    """Limit buckets to `bucket` bytes and pieces to `piece` elements."""
    cut_small(monkeypatch, min(piece, 1 << 10), piece)
    monkeypatch.setattr(engine.sizes, "PIECE", 1)
    for module in (engine.sizes, cluster.remote_shards):
        monkeypatch.setattr(module, "WINDOW_BYTES", bucket * IN_FLIGHT * shards)


def zeros(dtype: torch.dtype = torch.float32) -> Callable[..., dict[Piece, Packed]]:
    return lambda bucket, wanted: {piece: pack(torch.zeros(piece.numel, dtype=dtype)) for piece in bucket}


def ones(bucket: Mapping[Piece, Packed], edges: Mapping[str, tuple[int, ...]]) -> dict[Piece, np.ndarray]:
    return {piece: np.ones((1, len(edges[piece.name]) - 1)) for piece in bucket}


def sums(bucket: Mapping[Piece, Packed], edges: Mapping[str, tuple[int, ...]]) -> dict[Piece, np.ndarray]:
    return {piece: np.full((1, len(edges[piece.name]) - 1), unpack(bucket[piece]).sum().item()) for piece in bucket}


def layout_of(plan: Any, chunks: int = 1) -> ChunkLayout:
    return ChunkLayout.make(plan.numels, dict.fromkeys(plan.merged, chunks))


def merged(shards: Shards, plan: Any, coefficients: Coefficients) -> dict[str, Tensor]:
    received = Received(plan)
    return received.all_of(shards.merge(coefficients, received))


def collected(shards: Shards, layout: ChunkLayout, slopes: Sequence[tuple[str, Tensor]]) -> np.ndarray:
    leaving = shards.gradients(layout)
    for name, slope in slopes:
        leaving.send(name, slope)
    return leaving.collect()


def exchange_all(plan: Any, shards: int, line: Line) -> RemoteShards:
    """Merge every tensor and send every gradient once."""
    remote = RemoteShards(plan, line.handles(shards, zeros(getattr(torch, plan.dtype)), ones))
    merged(remote, plan, Coefficients.constant(layout_of(plan), [0.5]))
    slopes = [(name, torch.ones(numel, dtype=getattr(torch, plan.dtype))) for name, numel in plan.numels.items()]
    collected(remote, layout_of(plan), slopes)
    return remote


@settings(deadline=None, max_examples=60)
@given(
    numels=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    shards=st.integers(1, 9),
    limit=st.sampled_from([1, 40, 100, 10**6]),
    piece=st.sampled_from([7, 25, 1000]),
    dtype=st.sampled_from(sorted(SIZES)),
)
def test_every_piece_travels_once_each_way_in_a_bucket_of_its_shard(
    numels: list[int], shards: int, limit: int, piece: int, dtype: str
) -> None:
    plan, line, size = plan_like(numels, dtype), Line(), SIZES[dtype]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cluster.remote_shards, "ray", SimpleNamespace(get=line.get, wait=line.wait))
        confine(monkeypatch, limit, shards, piece)
        remote = exchange_all(plan, shards, line)
        cut = {name: list(pieces(name, (numel,))) for name, numel in plan.numels.items()}
    assert limit <= remote.bucket_bytes <= max(limit, size)
    for method in ("merge", "gradients"):
        buckets = line.buckets(method)
        for shard, names in enumerate(slices(plan, shards)):
            # Gradients are sent in the order of the plan.
            ordered = in_order_of_use(names) if method == "merge" else names
            owned = [one for owner, bucket in buckets if owner == shard for one in bucket]
            assert owned == [one for name in ordered for one in cut[name]]
        for _, bucket in buckets:
            assert len(bucket) == 1 or 0 < sum(one.numel for one in bucket) * size <= remote.bucket_bytes
    assert list(remote.traffic().values()) == [sum(numels) * size] * 2
    assert max(line.most.values()) <= IN_FLIGHT * shards and line.most_together <= IN_FLIGHT * shards


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
    monkeypatch: pytest.MonkeyPatch, line: Line, dtype: str, limit: int, buckets: list[tuple[int, str]]
) -> None:
    confine(monkeypatch, limit, shards=2)
    exchange_all(plan_like([10, 9, 5, 4, 3, 4, 1], dtype), 2, line)
    wanted = [(shard, [f"t{number}" for number in names.split()]) for shard, names in buckets]
    assert [(shard, [one.name for one in bucket]) for shard, bucket in line.buckets("merge")] == wanted


def test_a_bucket_is_never_too_small_for_a_piece_nor_the_buckets_together_too_large() -> None:
    plan = plan_like([10])
    for shards in (1, 4, 64):
        remote = RemoteShards(plan, [None] * shards)
        piece = engine.sizes.PIECE * 4
        assert remote.bucket_bytes >= piece
        assert remote.bucket_bytes * IN_FLIGHT * shards <= max(
            cluster.remote_shards.WINDOW_BYTES, piece * IN_FLIGHT * shards
        )


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("sizes", ["even", "one large"])
def test_only_so_many_merges_are_open(monkeypatch: pytest.MonkeyPatch, line: Line, sizes: str, shards: int) -> None:
    confine(monkeypatch, 40, shards)
    plan = plan_like([10] * 24 if sizes == "even" else [120] + [10] * 24)
    merged(RemoteShards(plan, line.handles(shards, zeros(), ones)), plan, Coefficients.constant(layout_of(plan), [0.5]))
    assert len(line.asked) == len(plan.merged) and not any(line.open.values())
    assert line.most_together == IN_FLIGHT * shards, "the window is full as long as calls remain"


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("sizes", ["even", "one large"])
@pytest.mark.parametrize("times", [1, 3])
def test_only_so_many_gradients_are_open_at_a_shard(
    monkeypatch: pytest.MonkeyPatch, line: Line, times: int, sizes: str, shards: int
) -> None:
    confine(monkeypatch, 40, shards)
    plan = plan_like([10] * 24 if sizes == "even" else [120] + [10] * 24)
    remote = RemoteShards(plan, line.handles(shards, zeros(), ones))
    slopes = [(name, torch.ones(numel)) for name, numel in plan.numels.items()]
    collected(remote, layout_of(plan), slopes * times)
    assert len(line.asked) == times * len(plan.merged) and not any(line.open.values())
    assert max(line.most.values()) == IN_FLIGHT


def test_a_gradient_waits_at_the_trainer_while_the_shards_have_enough_to_do(
    monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    confine(monkeypatch, 40, shards=1)
    line.gate.clear()
    plan = plan_like([10] * 8)
    leaving = RemoteShards(plan, line.handles(1, zeros(), ones)).gradients(layout_of(plan))
    sent, fetched = [], []

    def send_all() -> None:
        for name in plan.merged:
            leaving.send(name, torch.ones(10))
            sent.append(name)

    def fetching(gradient: Tensor) -> Fetch:
        return lambda start, stop: fetched.append(gradient) or to_cpu(gradient)(start, stop)

    monkeypatch.setattr(cluster.remote_shards, "to_cpu", fetching)

    sending = begun(send_all)
    deadline = time.monotonic() + LONG
    while len(fetched) < IN_FLIGHT + 2 and time.monotonic() < deadline:
        time.sleep(1e-3)
    wait([sending], timeout=0.05)
    assert not sending.done() and len(line.asked) == IN_FLIGHT
    # One is in the bucket that waits to be sent, one does not fit into it; two more may wait for the window.
    assert len(fetched) == IN_FLIGHT + 2 and len(sent) <= IN_FLIGHT + 4
    line.gate.set()
    sending.result(LONG)
    assert leaving.collect().sum() == len(plan.merged) == len(fetched)


def test_a_gradient_larger_than_a_bucket_travels_in_several_and_is_let_go_of(
    monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    confine(monkeypatch, 100, shards=1, piece=20)
    plan = plan_like([3, 131, 5])
    remote = RemoteShards(plan, line.handles(1, zeros(), ones))
    leaving = remote.gradients(layout_of(plan))
    large = torch.arange(131.0)
    seen = weakref.ref(large)
    leaving.send("t0", torch.ones(3))
    leaving.send("t1", large)
    del large
    remote.thread.submit(gc.collect).result(LONG)
    assert seen() is None, "it is released before the next one is sent"
    leaving.send("t2", torch.ones(5))
    leaving.collect()
    assert [sum(one.numel for one in bucket) for _, bucket in line.buckets("gradients")] == [
        23,
        20,
        20,
        20,
        20,
        20,
        11,
        5,
    ]
    travelled = [unpack_all(one.arguments[0]) for one in line.asked]
    parts = [part for bucket in travelled for piece, part in bucket.items() if piece.name == "t1"]
    assert torch.equal(torch.cat(parts), torch.arange(131.0))


@pytest.fixture(scope="module")
def plans(llama_merge: Path) -> dict[str, Plan]:
    return {dtype: plan_of(llama_merge, f"dtype={dtype}") for dtype in SIZES}


def plain_shards(line: Line, plan: Plan, count: int) -> list[Any]:
    """Handles whose calls are executed by a plain `Shard`."""
    shard = Shard(plan, 0)
    return line.handles(count, shard.merge, shard.gradients)


def table_of(plan: Plan) -> Coefficients:
    layout = ChunkLayout.make(plan.numels, {name: i % 4 for i, name in enumerate(plan.merged)})
    return Coefficients(layout, np.random.default_rng(0).uniform(0.1, 0.9, (len(plan.experts), layout.width)))


def slopes_of(plan: Plan, seed: int) -> list[tuple[str, Tensor]]:
    """Gradients in the order of a backward pass: the last tensors first."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: plan.base_header.tensors[name].shape for name in reversed(plan.merged)}
    dtype = getattr(torch, plan.dtype)
    return [(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()]


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("shards", [1, 3, 40])
@pytest.mark.parametrize("piece", [300, 10**6])
def test_remote_shards_are_local_ones_with_every_byte_counted(
    monkeypatch: pytest.MonkeyPatch, line: Line, plans: dict[str, Plan], dtype: str, shards: int, piece: int
) -> None:
    confine(monkeypatch, 5_000, shards, piece)
    plan = plans[dtype]
    remote, local = RemoteShards(plan, plain_shards(line, plan, shards)), LocalShards(plan, 1, overlap=False)
    assert remote.traffic() == {"bytes_to_shards": 0, "bytes_from_shards": 0}
    table = table_of(plan)
    found, wanted = merged(remote, plan, table), merged(local, plan, table)
    for name in plan.merged:
        assert not found[name].isnan().any() and torch.equal(found[name], wanted[name])
    assert remote.traffic() == {"bytes_to_shards": 0, "bytes_from_shards": plan.merged_bytes}

    slopes = slopes_of(plan, 1)
    gradient = collected(remote, table.layout, slopes)
    np.testing.assert_array_equal(gradient, collected(local, table.layout, slopes))
    assert gradient.all() and gradient.shape == (len(plan.experts), table.layout.width)
    assert remote.traffic() == {"bytes_to_shards": plan.merged_bytes, "bytes_from_shards": plan.merged_bytes}
    assert plan.merged_bytes == sum(plan.numels.values()) * SIZES[dtype]
    if shards < 40:
        assert len(line.asked) > 2 * shards, "several buckets for each shard"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("limit", [500, 20_000])
def test_tensors_that_leave_several_times_add_up_as_locally(
    monkeypatch: pytest.MonkeyPatch, line: Line, plans: dict[str, Plan], limit: int, shards: int
) -> None:
    confine(monkeypatch, limit, shards, piece=300)
    plan, layout = plans["float32"], table_of(plans["float32"]).layout
    remote, local = RemoteShards(plan, plain_shards(line, plan, shards)), LocalShards(plan, 1, overlap=True)
    samples = [slopes_of(plan, seed) for seed in range(3)]
    gradient = collected(remote, layout, [one for sample in samples for one in sample])
    np.testing.assert_array_equal(gradient, collected(local, layout, [one for sample in samples for one in sample]))
    apart = sum(collected(local, layout, sample) for sample in samples)
    np.testing.assert_allclose(gradient, apart, rtol=1e-9, atol=1e-9)
    assert remote.traffic()["bytes_to_shards"] == 3 * plan.merged_bytes


def test_a_tensor_may_leave_twice_in_a_row(monkeypatch: pytest.MonkeyPatch, line: Line) -> None:
    """A bucket cannot hold the same tensor twice."""
    confine(monkeypatch, 10**6, shards=1)
    plan = plan_like([5, 4])
    remote = RemoteShards(
        plan,
        line.handles(
            1, zeros(), lambda bucket, edges: {p: np.full((1, 1), t.sum()) for p, t in unpack_all(bucket).items()}
        ),
    )
    slopes = [("t0", torch.full((5,), 1.0)), ("t0", torch.full((5,), 10.0)), ("t1", torch.full((4,), 100.0))]
    assert collected(remote, layout_of(plan), slopes).tolist() == [[55, 400]]
    assert [len(bucket) for _, bucket in line.buckets("gradients")] == [1, 2]


def test_what_a_step_moves_does_not_depend_on_experts_shards_or_buckets(
    monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    moved = set()
    for experts, shards, limit, piece in [(1, 1, 10**6, 10**6), (7, 3, 100, 4), (2, 12, 1, 9)]:
        confine(monkeypatch, limit, shards, piece)
        plan = plan_like(range(1, 20), experts=experts)
        layout = layout_of(plan, 2)
        remote = RemoteShards(plan, line.handles(shards, zeros(), ones))
        merged(remote, plan, Coefficients.constant(layout, [0.5] * experts))
        collected(remote, layout, [(name, torch.ones(numel)) for name, numel in plan.numels.items()])
        moved.add(tuple(remote.traffic().values()))
    assert moved == {(190 * 4, 190 * 4)}


@pytest.mark.parametrize(
    ("gradients", "batch_tokens", "out"),
    [("accumulate", 1, 1), as_thorough(("stream", 1, 3)), ("stream", 20, 2), as_thorough(("stream", 30, 1))],
)
def test_a_trainer_moves_one_gradient_out_and_one_set_of_merged_tensors_in(
    monkeypatch: pytest.MonkeyPatch, line: Line, tmp_path: Path, gradients: str, batch_tokens: int, out: int
) -> None:
    settings = f"gradients={gradients}", f"batch_tokens={batch_tokens}"
    plan = plan_of(tiny.make_merge(tmp_path / "merge", samples=(2, 1)), *settings)
    plain = Plain(plan, tmp_path)
    assert [[sample.tokens for sample in mine] for mine in plain.samples] == [[9, 10], [9]]
    confine(monkeypatch, 5_000, shards=2, piece=300)
    remote = RemoteShards(plan, plain_shards(line, plan, 2))
    trainer = Trainer(plan, remote, lambda target: target)
    window = [WindowSample(plain.samples[k][i], target) for (k, i), target in plain.targets.items()]
    size = plan.merged_bytes
    first = trainer.step(first_stage(plan), None, 0, window)
    assert remote.traffic() == {"bytes_to_shards": out * size, "bytes_from_shards": size}
    # The same step again, as after the loss of another actor: tensors that are already merged are not sent again.
    again = trainer.step(first_stage(plan), None, 0, window)
    assert remote.traffic() == {"bytes_to_shards": 2 * out * size, "bytes_from_shards": size}
    assert torch.equal(first.state["a"], again.state["a"])
    trainer.step(first_stage(plan), first.state, 1, window)
    assert remote.traffic() == {"bytes_to_shards": 3 * out * size, "bytes_from_shards": 2 * size}

    local = Trainer(plan, LocalShards(plan, 1, overlap=False), lambda target: target)
    alone = local.step(first_stage(plan), None, 0, window)
    assert torch.equal(alone.state["a"], first.state["a"]), "bit-identical to shards within the trainer"


def lost(*_: Any) -> Any:
    raise ConnectionError("shard-7")


def test_the_error_of_a_shard_comes_out(line: Line) -> None:
    plan = plan_like([10, 20, 30])
    remote = RemoteShards(plan, line.handles(2, lost, lost))
    arrivals = remote.merge(Coefficients.constant(layout_of(plan), [0.5]), Received(plan))
    assert set(arrivals) == set(plan.merged)
    for name in plan.merged:
        with pytest.raises(ConnectionError, match="shard-7"):
            arrivals[name][0].result(LONG)
    with pytest.raises(ConnectionError, match="shard-7"):
        collected(remote, layout_of(plan), [(name, torch.ones(numel)) for name, numel in plan.numels.items()])


def test_a_gradient_that_cannot_be_fetched_is_an_error_and_takes_no_room(
    monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    confine(monkeypatch, 40, shards=1)
    plan = plan_like([10] * 6)
    leaving = RemoteShards(plan, line.handles(1, zeros(), ones)).gradients(layout_of(plan))
    monkeypatch.setattr(cluster.remote_shards, "to_cpu", lambda gradient: lost)

    def send_all() -> None:
        for name in plan.merged:
            leaving.send(name, torch.ones(10))

    begun(send_all).result(LONG)
    with pytest.raises(ConnectionError):
        leaving.collect()


def test_gradients_on_a_gpu_need_few_buffers(monkeypatch: pytest.MonkeyPatch, line: Line) -> None:
    """A bucket has more tensors than there are buffers."""
    confine(monkeypatch, 400, shards=1, piece=20)
    plan = plan_like([3, 131, 5, *[1] * 30])
    slopes = [(name, torch.arange(1.0, numel + 1)) for name, numel in plan.numels.items()]
    wanted = collected(RemoteShards(plan, line.handles(1, zeros(), sums)), layout_of(plan), slopes)
    cuda = fake_cuda(monkeypatch, buffers=1)
    remote = RemoteShards(plan, line.handles(1, zeros(), sums))
    np.testing.assert_array_equal(collected(remote, layout_of(plan), slopes), wanted)
    assert len(cuda.pinned) == 1 and wanted.all()


def test_packed_pieces_of_a_shard_are_the_streams_own(plans: dict[str, Plan]) -> None:
    """The actor returns exactly what the engine computes."""
    plan = plans["bfloat16"]
    table, shard, streams = table_of(plan), Shard(plan, 0), open_task_vectors(plan, 1)
    name = plan.merged[2]
    (piece,) = pieces(name, plan.base_header.tensors[name].shape)
    wanted = {piece: table.of(name)}
    tensor = unpack_all(shard.merge([piece], {name: table.of(name)}))[piece]
    assert torch.equal(tensor, streams.merge_all(wanted)[piece])
    slope = {piece: dict(slopes_of(plan, 1))[name].reshape(-1)}
    edges = {name: table.of(name).edges}
    found = shard.gradients(pack_all(slope), edges)
    np.testing.assert_array_equal(found[piece], streams.gradients_all(slope, edges)[piece])
