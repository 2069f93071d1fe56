"""The devices of an actor follow its seat, whatever GPUs its process sees."""

from __future__ import annotations

import pytest
import torch
from errors import refused
from fake_gpus import FakeGpus

from actors.gpus import Gpus
from actors.process import ActorProcess
from engine.errors import ClusterError

CPU = torch.device("cpu")


def cuda(*places: int) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", place) for place in places)


@pytest.mark.parametrize("seen", [0, 1, 8])
def test_a_seat_without_gpus_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch, seen: int) -> None:
    gpus = FakeGpus(monkeypatch, seen)
    assert ActorProcess("trainer").devices == (CPU,)
    assert ActorProcess("trainer", gpus=Gpus(0, (0, 1))).device == CPU
    assert gpus.current is None


@pytest.mark.parametrize(("number", "places"), [(0.25, [0]), (1, [0]), (2, [0, 1])])
def test_a_seat_with_gpus_uses_those_that_ray_shows(
    monkeypatch: pytest.MonkeyPatch, number: float, places: list[int]
) -> None:
    """Ray numbers the GPUs of the node; in the process, those of the seat are the first."""
    gpus = FakeGpus(monkeypatch, len(places))
    process = ActorProcess("trainer", gpus=Gpus(number, tuple(5 + place for place in places)))
    assert process.devices == cuda(*places)
    assert (process.device, gpus.current) == (torch.device("cuda", 0), 0)


@pytest.mark.parametrize(
    ("visible", "ids", "places"),
    [
        (None, (3, 2), (2, 3)),
        ("4,5,6,7", ("6",), (2,)),
        ("4, 5,6,7", ("5", "7"), (1, 3)),
        ("GPU-a,GPU-b,GPU-c", ("GPU-b",), (1,)),
        ("", (1,), (1,)),
    ],
)
def test_where_all_gpus_of_a_node_are_visible_the_ids_of_ray_choose(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, ids: tuple[int | str, ...], places: tuple[int, ...]
) -> None:
    """As with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1."""
    gpus = FakeGpus(monkeypatch, 8)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    process = ActorProcess("expert 0", gpus=Gpus(len(ids), ids))
    assert process.devices == cuda(*places)
    assert gpus.current == places[0]


def test_without_ray_the_first_gpus_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpus(monkeypatch, 4)
    assert Gpus(2).devices() == cuda(0, 1)


@pytest.mark.parametrize(("number", "seen"), [(0.5, 0), (1, 0), (2, 1)])
def test_a_seat_whose_gpus_torch_does_not_see_is_an_error(
    monkeypatch: pytest.MonkeyPatch, number: float, seen: int
) -> None:
    FakeGpus(monkeypatch, seen)
    process = ActorProcess("trainer", gpus=Gpus(number, (0,)))
    with refused(ClusterError, "node", "num_gpus", facts=[torch.__version__, f"sees {seen}"]):
        _ = process.devices
