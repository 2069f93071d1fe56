"""`cli.py cache` lists and empties a cache, and no other folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import cli
from engine.storage.content_cache import ContentCache

KEYS = [f"{number:064x}" for number in range(3)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["cache", *map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of three targets of 1000 bytes, of which the first was used long ago."""
    cache = ContentCache(str(tmp_path / "cache"), 1 << 40, 1 << 40)
    for key in KEYS:
        cache.write("targets", key, key.encode()[:1] * 1000)
    (old,) = (tmp_path / "cache" / "targets").glob(f"{KEYS[0]}-*")
    os.utime(old, (0, 0))
    return tmp_path / "cache"


def test_entries_are_listed_and_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_MERGING_RUN_CACHE", str(root))
    listed = run()
    assert listed.exit_code == 0 and {str(root), "3.0", "targets", "3"} <= {*listed.output.replace(":", " ").split()}
    assert run("--older-than", 30).exit_code == 0
    assert len(list((root / "targets").iterdir())) == 2
    assert run("--folder", root, "--clear").exit_code == 0
    assert list((root / "targets").iterdir()) == []
    assert run().exit_code == 0


def test_no_other_folder_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run("--folder", tmp_path / "mine", "--clear").exit_code == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert run("--folder", tmp_path / "missing").exit_code == 0 and not (tmp_path / "missing").exists()
    (tmp_path / "empty").mkdir()
    assert run("--folder", tmp_path / "empty", "--clear").exit_code == 0 and not any((tmp_path / "empty").iterdir())
    monkeypatch.setenv("EXPERT_MERGING_RUN_CACHE", "off")
    assert run("--clear").exit_code == 0
