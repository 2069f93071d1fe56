"""The run's folder: who may write where, what a stop leaves, and an output that appears whole."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of

from engine.calibration import Sample
from engine.errors import OutputError
from engine.run_folder import RunFolder, StageState, check_output, identity, load_plan, open_run

ROWS = [{"stage": 1, "step": 0, "model": "math", "kl": 0.5}]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def record(out: Path, content: bytes | str) -> None:
    (out / "merge").mkdir(parents=True)
    path = out / "merge" / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def computed(run: RunFolder) -> None:
    """What a merge leaves once it has begun to compute."""
    run.target(Sample(0, 0, (1, 2), "x.jsonl:1")).write_bytes(b"a target")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_not_there_or_empty_may_be_used(out: Path, fresh: bool) -> None:
    assert not check_output(out, "this", fresh)
    out.mkdir()
    assert not check_output(out, "this", fresh)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("what", ["folder", "merge", "file"])
def test_a_folder_that_holds_something_else_is_refused_even_with_fresh(out: Path, what: str, fresh: bool) -> None:
    if what == "file":
        out.write_text("mine")
    else:
        (out / "merge").mkdir(parents=True)
        (out / "merge" / "notes.txt" if what == "merge" else out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="in use: it holds something that is no merge") as caught:
        check_output(out, "this", fresh)
    assert caught.value.where == str(out) and caught.value.exit_code == 2


def test_this_very_merge_is_done_unless_it_is_asked_for_anew(out: Path) -> None:
    record(out, "record: {identity: this}")
    assert check_output(out, "this", fresh=False)
    assert not check_output(out, "this", fresh=True)


@pytest.mark.parametrize(
    "content",
    [
        "record: {identity: other}",
        "record: {}",
        "record: text",
        "record: [identity]",
        "record:",
        "merge_method: expert_merging",
        "- a list",
        "",
        "not: [valid",
        b"\xff\xfe",
    ],
)
def test_another_merge_is_refused_and_with_fresh_replaced(out: Path, content: bytes | str) -> None:
    record(out, content)
    with pytest.raises(OutputError, match="in use: it holds another merge") as caught:
        check_output(out, "this", fresh=False)
    assert "--fresh" in caught.value.do
    assert not check_output(out, "this", fresh=True)


def test_a_run_stands_beside_its_output(out: Path) -> None:
    with open_run(out, "this", fresh=False) as run:
        assert run.out == out
        assert run.folder == out.with_name("merged.run") and run.folder.is_dir() and run.targets.is_dir()
        assert not out.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_computed_nothing_leaves_nothing_behind(out: Path, fails: bool) -> None:
    def begin() -> None:
        with open_run(out, "this", fresh=False):
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            begin()
    else:
        begin()
    assert names(out.parent) == set()


def test_a_run_that_computed_something_is_there_for_the_next_start(out: Path) -> None:
    with open_run(out, "this", fresh=False) as run:
        computed(run)
        run.save_stage(1, StageState(1, {"a": torch.ones(2)}), ROWS)
    with open_run(out, "this", fresh=False) as run:
        assert run.target(Sample(0, 0, (), "")).read_bytes() == b"a target"
        assert run.load_stage(1) is not None
        assert run.metrics() == ROWS


def test_every_sample_has_a_target_file_of_its_own(out: Path) -> None:
    run = RunFolder(out)
    paths = {run.target(Sample(expert, index, (), "")) for expert in range(12) for index in range(12)}
    assert len(paths) == 144
    assert all(path.parent == run.targets for path in paths)


def test_the_plan_is_kept_in_the_run_s_folder(out: Path, llama_merge: Path) -> None:
    plan = plan_of(llama_merge)
    with open_run(out, "this", fresh=False) as run:
        path = run.keep_plan(plan)
        assert path.parent == run.folder
        assert load_plan(path) == plan
    assert names(out.parent) == set(), "a plan alone is nothing to go on from"


def test_the_state_of_another_merge_is_refused_and_kept(out: Path) -> None:
    with open_run(out, "other", fresh=False) as run:
        computed(run)
    before = names(run.folder)
    with pytest.raises(OutputError, match="state of another merge") as caught, open_run(out, "this", fresh=False):
        pass
    assert "--fresh" in caught.value.do and str(run.folder) == caught.value.where
    assert names(run.folder) == before
    with open_run(out, "other", fresh=False) as again:
        assert names(again.targets) == {"0-0.safetensors"}


def test_fresh_discards_what_an_earlier_start_left(out: Path) -> None:
    with open_run(out, "other", fresh=False) as run:
        computed(run)
        run.save_stage(1, StageState(1, {}), ROWS)
        run.start_output()
    with open_run(out, "this", fresh=True) as run:
        assert names(run.folder) - {"lock"} == {"identity", "targets"}
        assert names(run.targets) == set()
        assert run.load_stage(1) is None and run.metrics() == []
        computed(run)
    with open_run(out, "this", fresh=False) as run:
        assert names(run.targets) == {"0-0.safetensors"}


def try_to_open(out: Path, fresh: bool) -> None:
    with (
        pytest.raises(OutputError, match="another merge is writing to this folder"),
        open_run(out, "this", fresh=fresh),
    ):
        pass


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_of_the_same_process_is_not_joined(out: Path, fresh: bool) -> None:
    with open_run(out, "this", fresh=False) as run:
        computed(run)
        try_to_open(out, fresh)
        thread_failed: list[BaseException] = []

        def in_a_thread() -> None:
            try:
                try_to_open(out, fresh)
            except BaseException as error:
                thread_failed.append(error)
                raise

        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        assert not thread_failed
        assert names(run.targets) == {"0-0.safetensors"}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_of_another_process_is_not_joined_until_it_ends(out: Path, fresh: bool) -> None:
    folder = RunFolder(out).folder
    folder.mkdir()
    (folder / "identity").write_text("this")
    script = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('held', flush=True)\n    input()"
    command = [sys.executable, "-c", script, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        try_to_open(out, fresh)
        assert (folder / "identity").read_text() == "this"
        other.communicate("\n")
    with open_run(out, "this", fresh=fresh) as run:
        assert run.targets.is_dir()


def test_the_lock_of_a_killed_process_does_not_hold(out: Path) -> None:
    folder = RunFolder(out).folder
    folder.mkdir()
    script = "import sys, time, filelock\nfilelock.FileLock(sys.argv[1]).acquire()\nprint(flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", script, str(folder / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "\n"
        other.kill()
    with open_run(out, "this", fresh=False) as run:
        assert (run.folder / "identity").read_text() == "this"


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OutputError, match="the output folder cannot be made"),
        open_run(tmp_path / "file" / "merged", "this", fresh=False),
    ):
        pass


def test_a_stage_s_state_comes_back_and_the_last_one_counts(out: Path) -> None:
    with open_run(out, "this", fresh=False) as run:
        assert run.load_stage(1) is None
        for steps in (1, 2, 3):
            learner = {"a": torch.full((2, 3), float(steps), dtype=torch.float64), "optimizer": {"step": steps}}
            run.save_stage(1, StageState(steps, learner), ROWS)
        run.save_stage(2, StageState(1, {"a": torch.zeros(1)}), ROWS)
        found = run.load_stage(1)
        assert found is not None and found.steps == 3
        assert found.learner is not None and found.learner["optimizer"] == {"step": 3}
        assert torch.equal(found.learner["a"], torch.full((2, 3), 3.0, dtype=torch.float64))
        second = run.load_stage(2)
        assert second is not None and second.steps == 1
        assert not list(run.folder.glob("*.part"))


def test_a_state_that_was_half_written_does_not_count(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(data: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with open_run(out, "this", fresh=False) as run:
        run.save_stage(1, StageState(1, {"a": torch.ones(1)}), ROWS)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", half)
            with pytest.raises(OSError, match="disk is full"):
                run.save_stage(1, StageState(2, {"a": torch.zeros(1)}), ROWS)
        found = run.load_stage(1)
        assert found is not None and found.steps == 1


def test_metrics_come_in_the_order_of_stages_and_steps_and_a_repeated_step_counts_once(out: Path) -> None:
    with open_run(out, "this", fresh=False) as run:
        for stage in (2, 1):
            for steps in (*range(12, 0, -1), 5):
                rows = [{"stage": stage, "step": steps - 1, "sample": sample} for sample in range(2)]
                run.save_stage(stage, StageState(steps, None), rows)
        run.save_stage(1, StageState(3, None), [{"stage": 1, "step": 2, "sample": 7}])
        found = [(row["stage"], row["step"], row["sample"]) for row in run.metrics()]
    wanted = [(stage, step, sample) for stage in (1, 2) for step in range(12) for sample in range(2)]
    wanted[4:6] = [(1, 2, 7)]
    assert found == wanted


def test_the_output_grows_in_an_empty_folder(out: Path) -> None:
    with open_run(out, "this", fresh=False) as run:
        (run.start_output() / "half.safetensors").write_text("of an earlier start")
        folder = run.start_output()
        assert names(folder) == {"merge"} and names(folder / "merge") == set()
        assert not out.exists()


def finish(out: Path, content: str) -> RunFolder:
    with open_run(out, "this", fresh=False) as run:
        computed(run)
        (run.start_output() / "model.safetensors").write_text(content)
        run.finish()
    return run


@pytest.mark.parametrize("before", ["nothing", "an empty folder"])
def test_a_finished_run_leaves_its_output_and_no_more(out: Path, before: str) -> None:
    if before != "nothing":
        out.mkdir()
    finish(out, "new")
    assert names(out.parent) == {"merged"}
    assert names(out) == {"merge", "model.safetensors"}


def test_a_finished_run_replaces_an_earlier_merge_whole(out: Path) -> None:
    finish(out, "old")
    (out / "left-over.json").write_text("of the old one")
    finish(out, "new")
    assert names(out.parent) == {"merged"}
    assert names(out) == {"merge", "model.safetensors"}
    assert (out / "model.safetensors").read_text() == "new"


def test_the_earlier_merge_stays_until_the_new_one_is_whole(out: Path) -> None:
    finish(out, "old")
    with open_run(out, "this", fresh=False) as run:
        computed(run)
        (run.start_output() / "model.safetensors").write_text("new")
        assert (out / "model.safetensors").read_text() == "old"
    assert (out / "model.safetensors").read_text() == "old"


def test_the_identity_is_that_of_what_decides_the_result(make_merge: Callable[..., Path]) -> None:
    config = make_merge()
    this = identity(plan_of(config))
    same = ["cluster.shards=3", "cluster.wait=1", "cluster.trainer.num_gpus=0"]
    assert identity(plan_of(config)) == this
    assert identity(plan_of(config, *same)) == this
    others = ["seed=1", "parameters.kappa=2", "models.0.parameters.weight=0.3", "merge_method=expert_merging"]
    digests = {identity(plan_of(config, override)) for override in others}
    assert len(digests) == len(others) and this not in digests

    calibration = config.parent / "expert0.jsonl"
    before = calibration.read_bytes()
    calibration.write_bytes(before + b'{"input_ids": [5, 6]}\n')
    assert identity(plan_of(config)) != this
    calibration.write_bytes(before)
    assert identity(plan_of(config)) == this

    weights = config.parent / "expert1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert identity(plan_of(config)) != this
