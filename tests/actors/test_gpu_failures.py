"""What an actor does when GPU memory does not suffice, is not back yet, or the GPU fails; and its figures."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from errors import refused
from fake_gpus import FakeGpus

import actors.process
from actors.gpus import NO_GPUS, Gpus
from actors.process import FAILED, ActorProcess, guarded
from engine.errors import ClusterError, GpuMemoryError

LACKING = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
FAULTS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
]


class Actor:
    """Raises the errors of `raises` in turn, then returns."""

    def __init__(self, *raises: RuntimeError) -> None:
        self._process, self.raises, self.forgotten = ActorProcess("trainer", gpus=Gpus(1)), list(raises), 0

    @guarded
    def work(self) -> str:
        assert self._process.device.type == "cuda"
        if self.raises:
            raise self.raises.pop(0)
        return "done"

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    monkeypatch.setattr(torch, "set_deterministic_debug_mode", lambda mode: None)
    return FakeGpus(monkeypatch, 1, free=5e9)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the process waits, which do not pass."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    return slept


@pytest.mark.parametrize("error", LACKING, ids=str)
def test_the_first_call_waits_once_for_memory_that_comes_back(
    gpus: FakeGpus, waited: list[float], error: RuntimeError
) -> None:
    actor = Actor(error)
    assert actor.work() == "done"
    assert (actor.forgotten, waited) == (1, [actors.process.SETTLING])
    actor = Actor(error, error)
    gpus.peak = 70_000_000_000
    with refused(GpuMemoryError, "trainer", facts=["70.0 GB", "5.0 GB", str(error)]) as caught:
        actor.work()
    assert isinstance(caught.value, ClusterError) and caught.value.exit_code == 3


@pytest.mark.parametrize("error", LACKING, ids=str)
def test_a_later_call_that_runs_out_of_memory_ends_in_an_error_with_numbers(
    gpus: FakeGpus, waited: list[float], error: RuntimeError
) -> None:
    actor = Actor()
    actor.work()
    actor.raises = [error]
    with refused(GpuMemoryError, "trainer", facts=["5.0 GB"]):
        actor.work()
    assert not waited and not actor.forgotten


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_a_process_whose_gpu_fails_ends(
    gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: RuntimeError
) -> None:
    """So that Ray starts another."""

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", ended)
    with pytest.raises(SystemExit) as caught:
        Actor(error).work()
    assert caught.value.code == FAILED
    assert str(error) in capsys.readouterr().err


def test_other_errors_are_raised_as_they_are(gpus: FakeGpus) -> None:
    for error in (RuntimeError("The size of tensor a (3) must match"), NotImplementedError("'linspace' on 'meta'")):
        with pytest.raises(type(error), match=str(error)[:10]) as caught:
            Actor(error).work()
        assert caught.value is error


def test_memory_that_comes_back_is_waited_for(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from an expert that was killed a moment ago, in whose seat the trainer starts."""
    seconds = [0.0]

    def sleep(interval: float) -> None:
        seconds[0] += interval
        if seconds[0] > 3:
            gpus.free[0] = 70_000_000_000

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    process = ActorProcess("trainer", gpus=Gpus(1))
    assert process.free(4e9) == (5_000_000_000,) and seconds == [0], "there is enough"
    assert process.free(60e9) == (70_000_000_000,)
    assert 3 < seconds[0] < actors.process.SETTLING
    assert process.free(90e9) == (70_000_000_000,), "and no more within the time"
    assert ActorProcess("trainer", gpus=NO_GPUS).free(1e9) == ()


def test_a_gpu_without_room_for_the_state_of_torch_has_none(
    gpus: FakeGpus, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(device: torch.device) -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    assert ActorProcess("trainer", gpus=Gpus(1)).free(1e9) == (0,)
    assert sum(waited) >= actors.process.SETTLING


def test_a_gpu_that_is_full_from_the_start_ends_in_the_same_error(
    gpus: FakeGpus, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "set_device", full)
    actor = Actor()
    actor.work = guarded(lambda self: self._process.device).__get__(actor)  # type: ignore[method-assign]
    with refused(GpuMemoryError, "trainer"):
        actor.work()
    assert waited == [actors.process.SETTLING] and actor._process.report().gpus == ()


def test_the_figures_have_the_gpus_of_the_seat(gpus: FakeGpus) -> None:
    process = ActorProcess("trainer", gpus=Gpus(1))
    assert process.report().gpus == (), "nothing was computed"
    assert process.device.type == "cuda"
    (peak,) = process.report().gpus
    assert (peak.name, peak.allocated, peak.reserved) == ("Fake 0", 1000, 2000)
    on_cpu: Callable[[], torch.device] = lambda: ActorProcess("shard 0").device  # noqa: E731
    assert on_cpu().type == "cpu"
