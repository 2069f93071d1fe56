"""An evaluation computes on the GPUs of its task, and on the CPU without any."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fake_gpus import FakeGpus

import cluster.evaluation
from actors.gpus import Gpus
from cluster.evaluation import EvaluationJob
from engine.checkpoints.find import ModelName
from engine.evaluation.lm_eval_harness import Tasks
from engine.evaluation.subject import Options
from engine.models.devices import Room


@pytest.mark.parametrize(
    ("seat", "places"), [(Gpus(), []), (Gpus(1), [0]), (Gpus(1, (3,)), [3]), (Gpus(2, (1, 3)), [1, 3])]
)
def test_the_seat_of_a_task_decides(monkeypatch: pytest.MonkeyPatch, seat: Gpus, places: list[int]) -> None:
    FakeGpus(monkeypatch, 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    loaded: list[torch.device] = []

    def load(device: torch.device, room: Room) -> None:
        loaded.extend((device, *room.others))

    monkeypatch.setattr(cluster.evaluation, "Subject", lambda *given: SimpleNamespace(load=load))
    monkeypatch.setattr(cluster.evaluation, "Evaluation", lambda subject, device: loaded.append(device))
    assert cluster.evaluation._run(EvaluationJob("model", ModelName("model"), (), Tasks(()), Options()), seat) == []
    expected = [torch.device("cuda", place) for place in places] or [torch.device("cpu")]
    assert loaded == [*expected, expected[0]]
