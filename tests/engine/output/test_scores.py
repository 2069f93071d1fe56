"""Scores in the output of a merge: its table of results, and its model card, as long as nobody changed that."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import plan_of
from errors import refused
from object_store import Store
from recorded_merges import write_merge

from engine.errors import ConfigError, OutputError
from engine.evaluation.results import Row
from engine.output.scores import outputs_among, record_scores, scores_text
from engine.report.merge_folder import Merged
from engine.run.contents import changed_in, read_manifest, write_manifest
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import open_folder

ROWS = [
    Row("/home/alice/merged", "math", "exact_match", 0.6, 9, "/home/alice/math"),
    Row("/home/alice/merged", "math", "loss", 2.5, 9, "/home/alice/math"),
    Row("/home/alice/math", "math", "exact_match", 0.8, 9, "/home/alice/math"),
]


def output(merge: Path, out: Path) -> LocalFolder:
    """Write an output without weights, and its manifest."""
    folder = LocalFolder(write_merge(plan_of(merge), out))
    write_manifest(folder, folder, folder, set())
    return folder


def in_storage(folder: LocalFolder, where: str) -> Folder:
    there = open_folder(where)
    for name in folder.names():
        there.write(name, folder.read(name))
    return there


def test_the_card_shows_the_last_scores(llama_merge: Path, tmp_path: Path, store: Store) -> None:
    here = output(llama_merge, tmp_path / "merged")
    for folder in (in_storage(here, f"{store.root}/merged"), here):
        written, before = read_manifest(folder), folder.read("README.md").decode()
        for value in (0.6, 0.7):
            assert outputs_among(["nothing", folder.where])[0].where == folder.where
            assert record_scores([Row("/home/alice/merged", "math", "f1", value, 9)], folder)
            assert changed_in(folder, written) == [], "the output can still be replaced"
            card = folder.read("README.md").decode()
            assert f"| merged | {value} |" in card and "alice" not in card
            assert len(card.splitlines()) == len(before.splitlines()) + 8
    table = Merged.read(here.where).evaluation
    assert table is not None and table["value"].to_pylist() == [0.7]


@pytest.mark.parametrize(("old", "new"), [("# A merge", "# My merge"), ("| merged | 0.6 |", "| merged | 0.9 |")])
def test_a_card_that_was_changed_stays(llama_merge: Path, tmp_path: Path, old: str, new: str) -> None:
    folder = output(llama_merge, tmp_path / "merged")
    rows = [Row("merged", "math", "f1", 0.6, 9)]
    assert record_scores(rows, folder)
    mine = folder.read("README.md").decode().replace(old, new)
    folder.write("README.md", mine.encode())
    assert not record_scores(rows, folder)
    assert folder.read("README.md").decode() == mine
    assert changed_in(folder, read_manifest(folder)) == ["README.md"]


def test_the_text_of_scores_has_shares_and_no_paths() -> None:
    text = scores_text(ROWS)
    assert "alice" not in text and "loss" not in text
    assert "| exact\\_match | math<br>(expert: math) | of the experts |" in text
    assert "| merged | 0.6 | 75.0% |" in text
    assert "| loss | math" in scores_text(ROWS[1:2]).replace("<br>(expert: math)", "")
    hostile = scores_text([Row("<!-- end of scores -->|x", "a\n|b", "f1", 1.0, 1)])
    assert "<!--" not in hostile and len(hostile.splitlines()) == len(scores_text(ROWS[:1]).splitlines())


def test_only_outputs_of_merges_record_scores(llama_merge: Path, tmp_path: Path) -> None:
    with refused(ConfigError, where="--record", facts=["merge/config.yaml"]):
        outputs_among([str(llama_merge.parent / "base"), "owner/name"])
    folder = output(llama_merge, tmp_path / "merged")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "merge").symlink_to(folder.path / "merge")
    with refused(ConfigError, where="--record"):
        outputs_among([str(tmp_path / "other")])
    folder.write("merge/evaluation.parquet", b"mine")
    with refused(OutputError, where="evaluation.parquet"):
        outputs_among([folder.where])
