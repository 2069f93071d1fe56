"""Advice about the place of the output is right: followed, the run begins there, or goes on, and nothing is removed.

More of it is followed in test_advice_on_outputs.py.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from advice import Advice, found, refusal
from conftest import plan_of
from identities import merge_of
from test_advice_on_outputs import begin, earlier, put, state

from engine.planning.plan import Plan
from engine.run.contents import write_manifest
from engine.run.inputs import identity
from engine.run.ownership import MARKER, RECORD
from engine.run.place import check_apart, check_place
from engine.run.run_folder import check_output, open_run
from engine.storage.local_folder import LocalFolder

OUTPUTS = "test_advice_on_outputs.py"
ADVICE = Advice(
    __name__,
    elsewhere={
        "{error.do}": "the advice of the storage, which engine/storage gives",
        "the folder cannot be read: {error.strerror}": "a disk that does not answer",
        "what: {what}\n  where: {folder.where}\n  do: give another --out": "a disk that does not answer",
        "the output folder cannot be used: {error.strerror}": "a disk that does not answer",
        "the folder for the state of the run holds something else": OUTPUTS,
        "where: {folder.where}\n  do: {do}": f"{OUTPUTS}: another merge",
        "the output folder holds more than the earlier merge": OUTPUTS,
        "it holds something other than a merge": OUTPUTS,
        "the state of another merge into this folder still exists": OUTPUTS,
        "discard the state of the run with --fresh": OUTPUTS,
        "what: {what}\n  where: {str(path)[:200]}": f"{OUTPUTS}: a name that is too long",
    },
)
OURS = merge_of("ours")


def test_every_advice_is_followed_or_has_a_reason() -> None:
    ADVICE.check()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "merged"


@ADVICE.followed("the folder for the state of the run is a file or a link")
def test_a_link_in_the_place_of_the_state_is_moved_away(out: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    state(out).symlink_to(tmp_path / "theirs")
    assert "move this away" in refusal(lambda: begin(out)).do
    state(out).rename(tmp_path / "link")
    begin(out)
    assert not list((tmp_path / "theirs").iterdir())


@ADVICE.followed("the state of a run in format {version}")
def test_a_state_of_another_version_is_removed(out: Path) -> None:
    begin(out)
    put(state(out), MARKER, json.dumps({"program": "expert-merging", "format": 0}))
    assert "remove the folder" in refusal(lambda: begin(out)).do
    shutil.rmtree(state(out))
    begin(out)


@ADVICE.followed("restore them, or redo the merge with --fresh")
def test_files_of_a_merge_are_restored_or_it_is_redone(out: Path) -> None:
    earlier(out, OURS)
    (out / "model.safetensors").unlink()
    assert "--fresh" in refusal(lambda: begin(out)).do
    begin(out, fresh=True)
    shutil.rmtree(state(out))
    put(out, "model.safetensors", "weights")
    assert check_output(str(out), OURS, fresh=False), "it is this merge, complete"


@ADVICE.followed("the output folder holds files that were changed after the merge")
def test_a_file_that_was_edited_is_moved_away(out: Path) -> None:
    earlier(out)
    put(out, "README.md", "card")
    record = json.loads((out / RECORD).read_text())
    record["record"]["files"].append("README.md")
    put(out, RECORD, json.dumps(record))
    write_manifest(LocalFolder(out), LocalFolder(out), LocalFolder(out), set())
    put(out, "README.md", "another card")
    error = refusal(lambda: begin(out, fresh=True))
    assert "move them away" in error.do and "README.md" in error.what
    (out / "README.md").rename(out.with_name("README.md"))
    begin(out, fresh=True)
    assert out.with_name("README.md").read_text() == "another card"


@ADVICE.followed("not as it was when this run began")
def test_a_run_whose_input_changed_begins_again(llama_merge: Path, out: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_merge.parent, tmp_path / "in")
    plan = plan_of(folder / "merge.yaml")
    with open_run(str(out), identity(plan), fresh=False) as run:
        run.state.write("stage-1.safetensors", b"a result")
        with open(folder / "expert0.jsonl", "a") as file:
            file.write('{"input_ids": [3, 4]}\n')
        assert "run the same command: it begins again" in refusal(lambda: run.check_unchanged(plan)).do
    with open_run(str(out), identity(plan_of(folder / "merge.yaml")), fresh=False) as run:
        assert not run.computed()


@ADVICE.followed("the output folder now holds something that this run does not replace")
def test_what_appeared_in_the_output_is_moved_away_and_the_run_goes_on(out: Path) -> None:
    def finish(runs: bool) -> None:
        with open_run(str(out), OURS, fresh=False) as run:
            assert run.computed() == runs
            run.state.write("stage-1.safetensors", b"a result")
            run.start_output(["model.safetensors"])
            run.weights.write("model.safetensors", b"weights")
            put(out, "notes.txt") if not runs else None
            run.finish()

    error = refusal(lambda: finish(runs=False))
    assert "notes.txt" in error.what and "move this away, then run the same command" in error.do
    (out / "notes.txt").rename(out.with_name("notes.txt"))
    finish(runs=True)
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert out.with_name("notes.txt").read_text() == "mine"


@ADVICE.followed(
    "the address has an empty part",
    "the output is the root of the file system",
    "a folder of the kernel",
    "there is a file of this name",
    "the output lies in the state of another run",
)
@pytest.mark.parametrize(
    "place",
    ["s3://bucket/a//b", "/", "/proc/merged", "{}/file", "{}/other.run/merged", "{}/file/merged", "{}/locked/merged"],
)
def test_another_place_is_accepted(out: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A folder that cannot be written is told by `os.access`, whatever user runs the test."""
    put(out.parent, "file")
    begin(out.with_name("other"))
    (out.parent / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    error = refusal(lambda: check_place(place.format(out.parent)))
    assert error.do == "give another --out"
    if place.startswith("s3://"):
        check_place(error.expected)
    begin(out)
    assert (out.parent / "file").read_text() == "mine"


@ADVICE.followed("the folder is a mount point")
def test_a_folder_in_a_mount_point_is_accepted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    begin(Path(found("--out (.+)", refusal(lambda: begin(out)))[1]))


@ADVICE.followed("the path of the output is too long")
def test_a_path_that_is_too_long_may_be_shortened(out: Path) -> None:
    assert "shorter --out" in refusal(lambda: check_place(str(out / "/".join(["x" * 200] * 19)))).do
    check_place(str(out / "/".join(["x" * 200] * 17)))


@ADVICE.followed("the output is in the place of `{key}`", "is in the place of the output", "in the place of {label}")
@pytest.mark.parametrize(
    ("place", "logs", "key"),
    [("logs", "logs", "`log_dir`"), ("expert0.jsonl", "logs", "--out"), ("base/merged", "logs", "--out")],
)
def test_output_inputs_and_logs_have_places_of_their_own(
    llama_merge: Path, out: Path, place: str, logs: str, key: str
) -> None:
    plan: Plan = plan_of(llama_merge)
    plan = replace(plan, config=plan.config.model_copy(update={"log_dir": str(llama_merge.parent / logs)}))

    def check(plan: Plan, out: Path) -> None:
        check_apart(plan, str(out), llama_merge)

    assert key in refusal(lambda: check(plan, llama_merge.parent / place)).do
    if key == "--out":
        check(plan, out)
    else:
        elsewhere = plan.config.model_copy(update={"log_dir": str(out.with_name("logs"))})
        check(replace(plan, config=elsewhere), llama_merge.parent / place)
