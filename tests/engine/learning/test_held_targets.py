"""Targets that are fetched ahead, and kept on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import torch
from conftest import LONG
from fake_cuda import fake_cuda

import engine.learning.held_targets
from engine.codec import Packed, pack_all
from engine.learning.held_targets import HeldTargets
from engine.learning.targets import Target

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Files:
    """Targets of 10 tokens, each full of the number that is its reference, and the order in which they were fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.came = threading.Condition()

    def pull(self, reference: int) -> Mapping[str, Packed]:
        with self.came:
            self.fetched.append(reference)
            self.came.notify_all()
        if reference < 0:
            raise ConnectionError(f"no target {reference}")
        states = torch.full((10, 4), float(reference))
        target = Target(torch.arange(10), {2: states}, states + 1, counted_C=torch.arange(10), inputs={"p": states})
        return pack_all(target.tensors())

    def wait_for(self, count: int) -> None:
        with self.came:
            assert self.came.wait_for(lambda: len(self.fetched) >= count, LONG)


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    moved: list[torch.device] = []

    def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(device)
        return tensor.clone()

    monkeypatch.setattr(engine.learning.held_targets, "to_gpu", move)
    return moved


def number(target: Target) -> float:
    assert target.last_hidden_CH is not None
    assert (target.last_hidden_CH == target.hidden_CH[2] + 1).all() and target.input_ids_T.tolist() == [*range(10)]
    return float(target.hidden_CH[2].mean())


def test_targets_on_a_gpu_are_fetched_once_as_far_as_there_is_room(files: Files, on_gpu: list[torch.device]) -> None:
    nbytes = 3 * 10 * 4 * 4 + 2 * 10 * 8
    targets = HeldTargets(files.pull, GPU, room=2 * nbytes)
    for _ in range(3):
        assert [number(targets.get((0, index), index)) for index in range(4)] == [0, 1, 2, 3]
    assert sorted(files.fetched) == [0, 1, 2, 2, 2, 3, 3, 3]
    assert on_gpu == [GPU] * 3 * 8, "token ids and positions stay on the CPU"


def test_targets_on_a_cpu_are_fetched_for_each_use_to_memory_of_their_own(files: Files) -> None:
    targets = HeldTargets(files.pull, CPU)
    first, again = (targets.get((0, 7), 7) for _ in range(2))
    assert files.fetched == [7, 7] and number(first) == number(again) == 7
    assert first.hidden_CH[2].data_ptr() != again.hidden_CH[2].data_ptr()


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_targets_are_fetched_ahead_and_used_once(
    files: Files, on_gpu: list[torch.device], device: torch.device
) -> None:
    targets = HeldTargets(files.pull, device, room=0)
    targets.prepare({(0, 1): 1, (0, 2): 2})
    targets.prepare({(0, 2): 2, (0, 3): 3})
    files.wait_for(3)
    assert files.fetched == [1, 2, 3]
    assert [number(targets.get((0, index), index)) for index in (2, 1, 3)] == [2, 1, 3]
    assert files.fetched == [1, 2, 3]
    assert number(targets.get((0, 1), 1)) == 1 and files.fetched == [1, 2, 3, 1]


def test_a_target_that_is_there_is_not_fetched_ahead(files: Files, on_gpu: list[torch.device]) -> None:
    targets = HeldTargets(files.pull, GPU)
    targets.get((0, 1), 1)
    targets.prepare({(0, 1): 1, (0, 2): 2})
    files.wait_for(2)
    assert [number(targets.get((0, index), index)) for index in (1, 2)] == [1, 2] and files.fetched == [1, 2]


def test_a_target_that_cannot_be_fetched_is_an_error_where_it_is_used(files: Files) -> None:
    targets = HeldTargets(files.pull, CPU)
    targets.prepare({(0, 1): -1, (0, 2): 2})
    assert number(targets.get((0, 2), 2)) == 2
    with pytest.raises(ConnectionError, match="no target -1"):
        targets.get((0, 1), -1)
    assert number(targets.get((0, 1), 1)) == 1


def test_a_tensor_is_moved_to_a_gpu_through_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch, buffers=2, nbytes=64)
    monkeypatch.setattr("engine.transfers.BUFFER", 64)
    tensor = torch.randn(7, 9)
    assert torch.equal(engine.transfers.to_gpu(tensor, CPU), tensor)
    assert torch.equal(engine.transfers.to_gpu(tensor.T, CPU, torch.bfloat16), tensor.T.bfloat16())
    assert engine.transfers.to_gpu(torch.empty(0, 3), CPU).shape == (0, 3)
    assert engine.transfers.to_gpu(torch.tensor(5), CPU).item() == 5
    assert len(cuda.pinned) == 2
