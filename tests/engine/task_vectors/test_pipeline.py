"""The pipeline of a file's tensors: its order, and the bound on work ahead, for any number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import cut_small
from errors import refused
from torch import Tensor

from engine.errors import ConfigError, RunError
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import Fill, SharedMemory, TensorJob, copy_of, stream
from engine.task_vectors.rounding import Rounding, Survival

SHAPES = {"a": (7, 5), "scalar": (), "b": (300,), "none": (0, 4), "c": (11, 13)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, 16, 32)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_the_stream_is_every_piece_of_every_tensor_in_order(
    pool: ThreadPoolExecutor, threads: int, dtype: torch.dtype
) -> None:
    tensors = {name: torch.randn(shape).mul(9).to(dtype) for name, shape in SHAPES.items()}
    jobs = [TensorJob(name, tuple(t.shape), dtype, lambda t=t: copy_of(t)) for name, t in tensors.items()]
    parts = stream(jobs, pool, threads)
    for name, tensor in tensors.items():
        received = [next(parts) for _ in pieces(name, tensor.shape)]
        assert len(received) > 1 or tensor.numel() < 36
        assert torch.equal(torch.cat([*received, torch.empty(0, dtype=dtype)]), tensor.reshape(-1))
    assert next(parts, None) is None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("small_blocks")
def test_no_more_is_computed_than_a_few_pieces_ahead(pool: ThreadPoolExecutor, threads: int) -> None:
    lock, filled, prepared = threading.Lock(), 0, 0

    def fill(piece: Piece, out_N: Tensor) -> None:
        nonlocal filled
        with lock:
            filled += 1
        out_N.fill_(1)

    def prepare() -> Fill:
        nonlocal prepared
        with lock:
            prepared += 1
        return fill

    jobs = [TensorJob(f"t{i}", (8, 48), torch.float32, prepare) for i in range(20)]
    each = len(list(pieces("t0", (8, 48))))
    for taken, _ in enumerate(stream(jobs, pool, threads), start=1):
        with lock:
            assert filled <= taken + threads + 1
            assert prepared <= filled / each + threads + 3
    assert (filled, prepared) == (20 * each, 20)


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.usefixtures("small_blocks")
def test_a_merged_tensor_has_the_same_bits_and_survives_alike_for_any_number_of_threads(
    pool: ThreadPoolExecutor, how: str
) -> None:
    base = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    exact = {name: one + 0.003 * torch.randn(one.shape) for name, one in base.items()}
    jobs = [
        TensorJob(name, SHAPES[name], torch.bfloat16, lambda t=t: copy_of(t), Rounding.of(name, base[name], how, 1))
        for name, t in exact.items()
    ]
    jobs.append(TensorJob("copied", (50,), torch.bfloat16, lambda: copy_of(torch.ones(50))))
    found = []
    for threads in (1, 3):
        survived: dict[str, Survival] = {}
        found.append((torch.cat(list(stream(jobs, pool, threads, survived))), survived))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[0][1].keys() == SHAPES.keys() - {"none"}
    written = found[0][0][:35].double()
    change = exact["a"].flatten().double() - 1
    assert found[0][1]["a"].share == pytest.approx(float((written - 1) @ change / change.square().sum()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_tensor(pool: ThreadPoolExecutor, value: float) -> None:
    tensor = torch.ones(50)
    tensor[49] = value
    with refused(RunError, where="late", do="--fresh", facts=["NaN", "float32"]):
        list(stream([TensorJob("late", (50,), torch.float32, lambda: copy_of(tensor))], pool, 2))


def test_large_weights_are_finite_though_their_sum_is_not(pool: ThreadPoolExecutor) -> None:
    tensor = torch.full((50,), 3e38)
    assert torch.equal(next(stream([TensorJob("t", (50,), torch.float32, lambda: copy_of(tensor))], pool, 2)), tensor)
    with refused(RunError, where="t", do="out_dtype", facts=["float16"]):
        list(stream([TensorJob("t", (50,), torch.float16, lambda: copy_of(tensor))], pool, 2))


def test_an_error_of_a_preparation_is_raised(pool: ThreadPoolExecutor) -> None:
    def prepare() -> Fill:
        raise ConfigError("no", "here")

    with refused(ConfigError, where="here"):
        list(stream([TensorJob("t", (5,), torch.float32, prepare)], pool, 2))


def test_threads_share_a_room_and_what_is_larger_goes_alone() -> None:
    room, lock, taken, most = SharedMemory(10), threading.Lock(), 0, 0

    def work(nbytes: int) -> None:
        nonlocal taken, most
        with room.take(nbytes):
            with lock:
                taken += nbytes
                assert taken <= 10 or taken == nbytes == 25
                most = max(most, taken)
            time.sleep(0.001)
            with lock:
                taken -= nbytes

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, [4, 25, 3, 6, 10, 1] * 10))
    assert taken == 0
    assert most == 25


def test_a_room_is_free_again_after_an_error() -> None:
    room = SharedMemory(10)
    with pytest.raises(KeyError), room.take(25):
        raise KeyError
    with room.take(10):
        pass
