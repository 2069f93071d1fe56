"""The trainer: its passes, and the targets that it fetches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import plan_of
from plain import Plain

import actors.trainer
from actors.trainer import Trainer, WindowSample
from engine.learning.learner import first_stage
from engine.learning.student import Losses, Student

pytestmark = pytest.mark.usefixtures("one_thread")


def window_of(plain: Plain) -> list[WindowSample]:
    return [
        WindowSample(sample, plain.targets[sample.expert, sample.index]) for mine in plain.samples for sample in mine
    ]


@pytest.mark.parametrize(
    ("given", "limit", "wanted"),
    [("auto", None, [7]), ("auto", 22, [2, 2, 2, 1]), ("30", None, [2, 3, 2]), ("30", 1, [1] * 7)],
)
def test_a_pass_has_at_most_its_tokens(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, limit: int | None, wanted: list[int]
) -> None:
    plain = Plain(plan_of(llama_merge, f"batch_tokens={given}"), tmp_path)
    found, sizes = [], []
    accumulate, make = Student.accumulate, Student

    def counting(student: Student, samples: Sequence[Any], leaving: Any) -> list[Losses]:
        found.append(len(samples))
        return accumulate(student, samples, leaving)

    monkeypatch.setattr(Student, "accumulate", counting)
    monkeypatch.setattr(actors.trainer, "Student", lambda *given: sizes.append(given[3]) or make(*given))
    trainer = Trainer(
        plain.plan, plain.shards, lambda target: target, batch_tokens=limit, logit_bytes=4 * 4 * tiny.VOCAB
    )
    trainer.step(first_stage(plain.plan), None, 0, window_of(plain))
    assert found == wanted and sizes == [4 * 4 * tiny.VOCAB]
