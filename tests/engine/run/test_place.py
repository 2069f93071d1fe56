"""Where an output may be: checks from its name and the plan alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import plan_of
from errors import refused

from engine.errors import OutputError
from engine.planning.plan import Plan
from engine.run import place
from engine.run.ownership import mark
from engine.run.place import check_apart, check_place
from engine.storage.local_folder import LocalFolder


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_merge.parent, tmp_path / "in")


@pytest.fixture
def plan(folder: Path) -> Plan:
    return plan_of(folder / "merge.yaml")


def test_a_folder_that_can_be_made_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "a/b/c", "empty", "ünï/ö ö", "a\nb", "a" * 251):
        check_place(str(tmp_path / name))
    check_place("s3://bucket/a")
    check_place("/dev/shm/merged")
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


@pytest.mark.parametrize("out", ["/", "/proc", "/proc/x", "/proc/1/out", "/sys/x", "/dev", "/dev/a/b", "/dev/null"])
def test_a_root_or_a_folder_of_the_kernel_is_refused(out: str) -> None:
    with refused(OutputError, where=out, do="--out"):
        check_place(out)


def test_a_link_into_a_folder_of_the_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    with refused(OutputError, where=str(tmp_path), do="--out"):
        check_place(str(tmp_path / "link" / "out"))


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("disk"))
    with refused(OutputError, where="disk", do=str(tmp_path / "disk" / "merged")):
        check_place(str(tmp_path / "disk"))


@pytest.mark.parametrize("out", ["s3://key:hush@bucket/a", "s3://bucket/a?access_key=me&secret_key=hush"])
def test_an_address_with_a_secret_is_refused(out: str) -> None:
    with refused(OutputError, do="AWS_SECRET_ACCESS_KEY") as caught:
        check_place(out)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("out", ["gs://bucket/../x", "s3://bucket/a/../base", "s3://bucket/a//b", "s3://bucket/./a"])
def test_an_address_with_several_meanings_is_refused(out: str) -> None:
    with refused(OutputError, where=out, do="--out"):
        check_place(out)
    check_place("s3://bucket/a/b..c/.d/")


@pytest.mark.parametrize("mount", ["merged", "merged/inner", "merged.run/targets"])
def test_a_folder_of_the_same_disk_that_is_mounted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str
) -> None:
    monkeypatch.setattr(place, "mount_points", lambda: ["/", str(tmp_path), str(tmp_path / mount)])
    with refused(OutputError, where=str(tmp_path / mount), do="--out"):
        check_place(str(tmp_path / "merged"))
    check_place(str(tmp_path / "merge"))


def test_mount_points_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        rb"36 35 98:0 /a /mnt/a\040b\134 rw - ext3 /dev/root rw" + b"\n37 36 0:5 / /mnt/\xc3\xbc rw - tmpfs none rw\n"
    )
    monkeypatch.setattr(Path, "read_bytes", lambda path: lines)
    assert place.mount_points() == ["/mnt/a b\\", "/mnt/ü"]


def test_a_mounted_state_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith(".run"))
    with refused(OutputError, where="merged.run", do="--out"):
        check_place(str(tmp_path / "merged"))


@pytest.mark.parametrize("out", ["file", "file/out", "file/a/out", "taken"])
def test_an_output_in_the_place_of_a_file_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken.run").write_text("mine")
    with refused(OutputError, do="--out"):
        check_place(str(tmp_path / out))


@pytest.mark.parametrize("name", ["a" * 252, "a" * 300, "ö" * 126, f"{'a' * 300}/out", "/".join(["b" * 200] * 20)])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, name: str) -> None:
    with refused(OutputError, where=str(tmp_path), facts=["255" if len(name) < 1000 else "3,696"]) as caught:
        check_place(str(tmp_path / name))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("out", ["merged", "a/b/merged"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    # As for a file system that is mounted read-only, which a test cannot mount.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with refused(OutputError, where=str(tmp_path), do="--out"):
        check_place(str(tmp_path / out))


def test_the_state_of_another_run_is_no_place(tmp_path: Path) -> None:
    mark(LocalFolder(tmp_path / "other.run"))
    with refused(OutputError, where="other.run", do="--out"):
        check_place(str(tmp_path / "other.run" / "a" / "out"))


def test_an_output_next_to_the_inputs_is_accepted(plan: Plan, folder: Path) -> None:
    for out in ("merged", "base2", "a/b", "expert0.out"):
        check_apart(plan, str(folder / out), folder / "merge.yaml")
    check_apart(plan, "s3://bucket/merged", folder / "merge.yaml")


@pytest.mark.parametrize(
    ("out", "inputs"),
    [
        ("base", ["in/base"]),
        ("base/out", ["in/base"]),
        ("expert1/a/b", ["'expert1'", "in/expert1"]),
        ("expert0.jsonl", ["in/expert0.jsonl"]),
        (".", ["in/merge.yaml"]),
        ("..", ["in/merge.yaml"]),
        ("link", ["in/base"]),
        ("link/out", ["in/base"]),
    ],
)
def test_an_output_in_the_place_of_an_input_is_refused(plan: Plan, folder: Path, out: str, inputs: list[str]) -> None:
    (folder / "link").symlink_to("base")
    with refused(OutputError, do="--out", facts=inputs):
        check_apart(plan, os.path.normpath(folder / out), folder / "merge.yaml")


@pytest.mark.parametrize("name", ["base", "expert1.jsonl"])
def test_an_input_in_the_place_of_the_state_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "taken.run")
    config = folder / "merge.yaml"
    config.write_text(config.read_text().replace(f": {name}", ": taken.run"))
    with refused(OutputError, where="taken.run", do="--out"):
        check_apart(plan_of(config), str(folder / "taken"), config)


def test_the_same_folder_under_another_name_is_found(plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind mount, or a disk that takes upper and lower case for the same."""
    (folder / "BASE").mkdir()
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: stat(str(path).replace("/BASE", "/base"), **k))
    with refused(OutputError, facts=["in/base"]):
        check_apart(plan, str(folder / "BASE"), folder / "merge.yaml")


@pytest.mark.parametrize("out", ["pictures", "pictures/out", "."])
def test_an_image_folder_is_an_input(folder: Path, out: str) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "pictures").mkdir()
    plan = plan_of(folder / "merge.yaml", "calibration.image_folder=data/pictures")
    with refused(OutputError, facts=["data/pictures"]):
        check_apart(plan, os.path.normpath(folder / "data" / out), folder / "merge.yaml")
    check_apart(plan, str(folder / "data" / "out"), folder / "merge.yaml")


@pytest.mark.parametrize("logs", ["out", "out/logs", "out.run", "out.run/logs"])
def test_logs_in_the_place_of_the_output_are_refused(folder: Path, logs: str) -> None:
    plan = plan_of(folder / "merge.yaml", f"log_dir={logs}")
    with refused(OutputError, where=str(folder / logs), do="log_dir"):
        check_apart(plan, str(folder / "out"), folder / "merge.yaml")
    check_apart(plan, str(folder / "other"), folder / "merge.yaml")


def test_an_image_of_a_record_is_an_input(plan: Plan, folder: Path) -> None:
    seen = replace(plan, images=((str(folder / "out.run" / "a.png"),), ()))
    with refused(OutputError, where="out.run", facts=["a.png"]):
        check_apart(seen, str(folder / "out"))


def other(plan: Plan, **places: str) -> Plan:
    return replace(plan, base=replace(plan.base, model=places["base"])) if "base" in places else replace(plan, **places)


@pytest.mark.parametrize(
    ("change", "out"),
    [
        (lambda plan: other(plan, base="s3://bucket/a/base"), "s3://bucket/a/base"),
        (lambda plan: other(plan, base="s3://bucket/a/base"), "s3://bucket/a"),
        (lambda plan: other(plan, base="s3://bucket/a/base?region=x"), "s3://bucket/a/base/out"),
        (lambda plan: other(plan, base="s3://bucket/a.run/base"), "s3://bucket/a"),
        (lambda plan: other(plan, tokenizer="gs://bucket/a/tokenizer"), "gs://bucket/a"),
        (lambda plan: other(plan, tokenizer="/a/tokenizer"), "/a"),
    ],
)
def test_inputs_in_object_storage_are_compared_by_their_keys(
    plan: Plan, change: Callable[[Plan], Plan], out: str
) -> None:
    with refused(OutputError, do="--out"):
        check_apart(change(plan), out)
    check_apart(change(plan), f"{out}-other" if out.startswith("/") else "s3://bucket/abc")
