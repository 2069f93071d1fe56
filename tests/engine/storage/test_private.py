"""The folder of a run's state belongs to one user alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from errors import refused

from engine.errors import OutputError
from engine.storage.private import check_private, make_private

OTHER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "out.run"
    before = os.umask(0)
    try:
        check_private(folder)
    finally:
        os.umask(before)
    assert mode(folder) == 0o700


def test_an_own_folder_is_accepted_unchanged_and_closed_later(tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    folder.mkdir()
    folder.chmod(0o775)
    (folder / "targets").mkdir()
    (folder / "targets" / "x").write_text("x")
    check_private(folder)
    assert mode(folder) == 0o775
    make_private(folder)
    assert mode(folder) == 0o700


def link(path: Path, target: str) -> None:
    path.symlink_to(path.parent.parent / target)


@pytest.mark.parametrize(
    ("place", "plant"),
    [
        ("out.run", lambda run: link(run, "elsewhere")),
        ("out.run", lambda run: link(run, "missing")),
        ("out.run/lock", lambda run: (run.mkdir(), link(run / "lock", "../victim"))),
        ("out.run/targets", lambda run: (run.mkdir(), link(run / "targets", "../elsewhere"))),
        ("out.run/targets/x", lambda run: ((run / "targets").mkdir(parents=True), link(run / "targets" / "x", "x"))),
    ],
)
def test_links_are_refused(tmp_path: Path, place: str, plant: Callable[[Path], object]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "victim").write_text("precious")
    plant(tmp_path / "out.run")
    with refused(OutputError, where=str(tmp_path / place), do="--out") as caught:
        check_private(tmp_path / "out.run")
    assert caught.value.exit_code == 2
    assert (tmp_path / "victim").read_text() == "precious" and list((tmp_path / "elsewhere").iterdir()) == []


@as_root
@pytest.mark.parametrize("place", ["out.run", "out.run/samples.json", "out.run/targets", "out.run/targets/x"])
def test_what_belongs_to_another_user_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "out.run" / "targets").mkdir(parents=True)
    for name in ("samples.json", "targets/x"):
        (tmp_path / "out.run" / name).write_text("planted")
    check_private(tmp_path / "out.run")
    os.chown(tmp_path / place, OTHER, OTHER)
    with refused(OutputError, where=str(tmp_path / place), do="--out", facts=[str(OTHER)]):
        check_private(tmp_path / "out.run")


def test_a_file_system_that_maps_users_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as NFS, on which the files of root belong to nobody."""
    check_private(tmp_path / "out.run")
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    check_private(tmp_path / "out.run")


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused(OutputError, where=str(tmp_path / "file" / "out.run")):
        check_private(tmp_path / "file" / "out.run")
