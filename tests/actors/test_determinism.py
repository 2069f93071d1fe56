"""Operations on GPUs are deterministic, or the run says which one is not. Torch's own refusals are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of
from fake_gpus import FakeGpus

from actors.expert import Expert
from actors.gpus import Gpus
from actors.process import ActorProcess, Report, guarded
from actors.trainer import Step, Trainer, WindowSample
from cluster.attempt import Attempt
from cluster.progress import Progress
from cluster.ray_watch import RayWatch
from engine.calibration.samples import Sample
from engine.codec import pack_all
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.learner import first_stage
from engine.learning.student import Student
from engine.planning.plan import Plan
from engine.run.run_folder import RunFolder
from engine.shards.local_shards import LocalShards


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    """Restore the settings of torch."""
    matmul = torch.backends.cuda.matmul
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = reduced


@pytest.fixture(scope="module")
def plan(llama_merge: Path) -> Plan:
    return plan_of(llama_merge)


def unordered() -> None:
    """Call an operation that has no deterministic implementation."""
    torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))


class Actor:
    """Calls `unordered` after `count` calls of `work`."""

    def __init__(self) -> None:
        self._process, self.done, self.forgotten = ActorProcess("an actor"), 0, 0
        torch.use_deterministic_algorithms(True)  # as on a GPU

    @guarded
    def work(self, error: str = "") -> int:
        self.done += 1
        if error:
            raise RuntimeError(error)
        unordered()
        return self.done

    def forget(self) -> None:
        self.forgotten += 1

    def report(self) -> Report:
        return self._process.report()


def test_on_a_gpu_operations_without_a_deterministic_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpus(monkeypatch, 1)
    process = ActorProcess("trainer", gpus=Gpus(1, (0,)))
    assert process.device == torch.device("cuda", 0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_a_call_is_repeated_once_without_determinism_and_the_report_says_so() -> None:
    actor = Actor()
    assert actor.report().not_deterministic == ""
    with pytest.warns(UserWarning, match="put_"):
        assert actor.work() == 2
    assert actor.forgotten == 1
    assert "put_" in actor.report().not_deterministic
    with pytest.warns(UserWarning, match="put_"):
        assert actor.work() == 3, "allowed from now on"
    assert actor.forgotten == 1


def test_another_error_is_raised() -> None:
    actor = Actor()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        actor.work("mat1 and mat2 shapes cannot be multiplied")
    assert (actor.done, actor.forgotten, actor.report().not_deterministic) == (1, 0, "")


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_a_step_that_is_repeated_is_the_same_step(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(0, 0, (5, 9, 11, 3), "here")
    window = [WindowSample(sample, pack_all(FrozenExpert(plan, 0, torch.device("cpu")).target(sample).tensors()))]

    def step() -> tuple[Any, Step]:
        trainer = Trainer(plan, LocalShards(plan, threads=1, overlap=False), lambda target: target)
        torch.use_deterministic_algorithms(True)
        first = trainer.step(first_stage(plan), None, 0, window)
        return trainer, trainer.step(first_stage(plan), first.state, 1, window)

    _, expected = step()
    accumulate = Student.accumulate

    def accumulated(self: Student, *args: Any) -> Any:
        losses = accumulate(self, *args)
        unordered()
        return losses

    monkeypatch.setattr(Student, "accumulate", accumulated)
    trainer, repeated = step()
    assert trainer.report().not_deterministic
    assert [row | {"seconds": 0} for row in repeated.rows] == [row | {"seconds": 0} for row in expected.rows]
    assert all(torch.equal(repeated.state[name], expected.state[name]) for name in expected.state)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_an_expert_computes_its_target_again(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target, loads = FrozenExpert.target, []

    def computed(self: FrozenExpert, *args: Any) -> Any:
        loads.append(id(self))
        unordered()
        return target(self, *args)

    monkeypatch.setattr(FrozenExpert, "target", computed)
    expert, folder = Expert(plan, 0), RunFolder(str(tmp_path / "out")).state
    torch.use_deterministic_algorithms(True)
    assert expert.target(Sample(0, 0, (5, 9, 11, 3), "here"), folder, "target") == folder.size("target")
    assert len(loads) == 2 and expert.report().not_deterministic


def test_the_run_names_the_operations_once(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    attempt = Attempt(plan, RunFolder(str(tmp_path / "out")), progress, RayWatch(progress.say))
    report = attempt.process.report()
    attempt.reports += [report, *(replace(report, not_deterministic="cumsum") for _ in range(2))]
    assert attempt._memory()["not_deterministic"] == ["cumsum"]
    assert "".join(capsys.readouterr()).count("cumsum") == 1
