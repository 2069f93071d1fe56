"""Copies to and from GPUs: what waits for what, and buffers that are used again."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import LONG, begun
from fake_cuda import fake_cuda
from torch import Tensor

import engine.transfers
from engine.transfers import Ring, computed, start_copy, to_cpu

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = torch.device("cpu")


class OnSecondGpu(Tensor):
    """A tensor that says that it is on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_a_tensor_on_the_cpu_is_read_where_it_is() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    with to_cpu(tensor)(2, 7) as part_N:
        assert part_N.data_ptr() == tensor.view(-1)[2:].data_ptr() and part_N.tolist() == [2, 3, 4, 5, 6]


def test_a_tensor_on_a_gpu_is_read_through_buffers_when_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch, buffers=1)
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    fetch = to_cpu(tensor)
    for start, stop in ((0, 5), (5, 12), (3, 3), (0, 12)):
        with fetch(start, stop) as part_N:
            assert part_N.dtype == tensor.dtype and part_N.tolist() == list(range(start, stop))
            assert part_N.untyped_storage().data_ptr() == cuda.pinned[0].data_ptr()
    assert len(cuda.pinned) == 1, "pinned once"


def test_a_copy_is_waited_for_on_the_streams_of_the_tensor_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current GPU of the calling thread may be another one."""
    cuda = fake_cuda(monkeypatch)
    device = OnSecondGpu.device
    monkeypatch.setattr(engine.transfers, "on_gpu", lambda tensor: isinstance(tensor, OnSecondGpu))
    with to_cpu(torch.ones(3).as_subclass(OnSecondGpu))(0, 3) as part_N:
        assert part_N.tolist() == [1, 1, 1]
    assert cuda.asked == [device] and list(cuda.copies) == [device]


def test_a_buffer_is_given_back_when_its_reader_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, buffers=1)
    fetch = to_cpu(torch.ones(3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost"), fetch(0, 3):
            raise RuntimeError("lost")


def test_a_copy_starts_after_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch)
    source, target = torch.zeros(3), torch.zeros(3)
    ready = start_copy(source, torch.ones(3))
    copied = start_copy(target, source, ready)
    assert not copied.query() and target.sum() == 0
    copied.synchronize()
    assert target.sum() == 3 and computed(HERE).query()
    assert list(cuda.copies) == [HERE]


def test_the_ring_has_so_many_buffers_and_waits_for_the_copies_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch)
    ring, targets = Ring(2, 64), [torch.zeros(4) for _ in range(9)]
    for value, target in enumerate(targets):
        buffer_N = ring.take(4, torch.float32)
        ring.give(buffer_N, start_copy(target, buffer_N.fill_(value)))
    for value, target in enumerate(targets[:7]):
        assert target.tolist() == [value] * 4, "copied before the buffer was used again"
    assert len(cuda.pinned) == 2
    first, second = ring.take(4, torch.float32), ring.take(8, torch.bfloat16)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    third = begun(lambda: ring.take(16, torch.float32))
    assert not third.done(), "both are held"
    ring.give(first)
    assert third.result(LONG).shape == (16,)


def test_a_buffer_whose_copy_is_done_is_used_again_before_another_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch)
    ring, target = Ring(4, 64), torch.zeros(4)
    for _ in range(5):
        buffer_N = ring.take(4, torch.float32)
        copied = start_copy(target, buffer_N.fill_(1))
        copied.synchronize()
        ring.give(buffer_N, copied)
    assert len(cuda.pinned) == 1


def test_a_ring_serves_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch)
    ring, targets = Ring(3, 64), [torch.zeros(16) for _ in range(60)]
    together = threading.Barrier(4)

    def copy_some(first: int) -> None:
        together.wait(LONG)
        for number in range(first, 60, 4):
            buffer_N = ring.take(16, torch.float32).fill_(number)
            ring.give(buffer_N, start_copy(targets[number], buffer_N))

    for copying in [begun(lambda first=first: copy_some(first)) for first in range(4)]:
        copying.result(LONG)
    cuda.copies[HERE].run(len(cuda.copies[HERE].work))
    assert [target.unique().tolist() for target in targets] == [[number] for number in range(60)]
    assert len(cuda.pinned) <= 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_tensor_is_read_and_written() -> None:
    tensor = torch.arange(1 << 20, dtype=torch.float32).cuda()
    with to_cpu(tensor)(3, 1 << 20) as part_N:
        assert part_N.is_pinned() and torch.equal(part_N, tensor[3:].cpu())
    source = torch.ones(1 << 20).pin_memory()
    start_copy(tensor, source, computed(tensor.device)).synchronize()
    assert torch.equal(tensor.cpu(), source)
