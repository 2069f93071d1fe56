"""Files that actors store: a repeated call does not write a target or an output file again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import plan_of

import actors.shard
from actors.expert import Expert
from actors.shard import Shard
from engine.calibration.samples import Sample
from engine.learning.targets import load_target, load_tensors
from engine.output.model_folder import output_files
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import open_folder

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLE, NAME = Sample(0, 0, (5, 9, 33, 12), "here"), "targets/0-0.safetensors"


def test_a_target_is_stored_once(llama_merge: Path, tmp_path: Path) -> None:
    plan, folder = plan_of(llama_merge), LocalFolder(tmp_path)
    expert = Expert(plan, 0)
    nbytes = expert.target(SAMPLE, folder, NAME)
    assert nbytes == folder.size(NAME)
    before = (tmp_path / NAME).stat()
    # A restarted actor loads no expert for a target that is stored already.
    for again in (expert, Expert(plan, 1)):
        assert again.target(SAMPLE, folder, NAME) == nbytes
    assert (tmp_path / NAME).stat().st_ino == before.st_ino
    assert [actor.report().counts["forwards"] for actor in (expert, again)] == [1, 0]
    assert again._held is None

    wanted = load_target(folder, NAME).tensors()
    found = load_tensors(folder, [NAME])
    assert found.keys() == wanted.keys() and wanted["input_ids"].tolist() == list(SAMPLE.input_ids)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )
    with pytest.raises(FileNotFoundError):
        load_tensors(folder, ["targets/none"])


@pytest.mark.parametrize("learned", [True, False])
def test_an_output_file_is_written_once(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: bool
) -> None:
    plan = plan_of(llama_merge, *([] if learned else ["merge_method=task_arithmetic"]))
    folder = LocalFolder(tmp_path)
    (file,) = output_files(plan)

    def write(shard: Shard) -> None:
        shard.write(folder, file, {}) if learned else shard.combine(folder, file)

    write(Shard(plan, 0))
    before = (tmp_path / file.name).stat()
    monkeypatch.setattr(actors.shard, "open_task_vectors", None)
    write(Shard(plan, 1))
    assert (tmp_path / file.name).stat().st_ino == before.st_ino and folder.names() == {file.name}


@pytest.mark.parametrize("place", ["disk", "object storage"])
def test_a_damaged_output_file_is_found(
    llama_merge: Path, tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    plan = plan_of(llama_merge)
    root = tmp_path if place == "disk" else request.getfixturevalue("store").root
    shard, folder = Shard(plan, 0, open_folder(f"{root}/state")), open_folder(f"{root}/output")
    (file,) = output_files(plan)
    shard.write(folder, file, {})
    assert shard.incomplete(folder, [file.name]) == {file.name: False}
    whole = folder.read(file.name)
    for content in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        folder.write(file.name, content)
        assert shard.incomplete(folder, [file.name]) == {file.name: True}
    folder.write(file.name, whole)
    for content in (b"", b"{}"):
        # What survived of its tensors is written with the file.
        shard._state.write(f"rounding/{file.name}.json", content)
        assert shard.incomplete(folder, [file.name]) == {file.name: True}
    folder.remove(file.name)
    assert shard.incomplete(folder, [file.name]) == {file.name: True}
    folder.write("other.safetensors", whole)
    assert shard.incomplete(folder, ["other.safetensors"]) == {"other.safetensors": True}
