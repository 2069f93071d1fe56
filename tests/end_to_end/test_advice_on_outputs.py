"""Advice about the output and the state of a run is right: followed, the run begins, and nothing else was removed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from identities import merge_of, record_of

from engine.errors import MergeError
from engine.run.identity import Identity, InputFile
from engine.run.ownership import IDENTITY, check_state
from engine.run.place import check_place
from engine.run.run_folder import RunFolder, check_output, open_run

OURS, OTHER = merge_of("ours"), merge_of("other")


def begin(out: Path, fresh: bool = False, merge: Identity = OURS) -> None:
    """Begin a run, as the driver does before its actors start, and stop it after its first result."""
    check_place(str(out))
    check_state(RunFolder(str(out)).state)
    assert not check_output(str(out), merge, fresh)
    with open_run(str(out), merge, fresh) as run:
        run.state.write("stage-1.safetensors", b"a result")


def put(folder: Path, name: str, text: str = "mine") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def earlier(out: Path, merge: Identity = OTHER) -> None:
    """Write a complete merge into the output."""
    for name, text in record_of(merge, ["model.safetensors"]).items():
        put(out, name, text)
    put(out, "model.safetensors", "weights")


def away(folder: Path) -> None:
    folder.rename(folder.with_name("moved away"))


def other_out(out: Path) -> None:
    begin(out.with_name("another"))


def with_fresh(out: Path) -> None:
    begin(out, fresh=True)


def state(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")


def damage(out: Path) -> None:
    begin(out)
    (state(out) / IDENTITY).write_bytes(b"damaged")


def linked(out: Path) -> None:
    begin(out)
    (state(out) / "samples.json").symlink_to(out.parent)


def changed_input() -> Identity:
    return Identity(OURS.options, OURS.versions, {"c.jsonl": InputFile(1, (), "0" * 64, "c.jsonl")})


@pytest.mark.parametrize(
    ("spoil", "named", "ways"),
    [
        (lambda out: out.write_text("mine"), "give another --out", [other_out]),
        (lambda out: put(out, "notes.txt"), "give another --out", [other_out]),
        (
            lambda out: put(state(out), "notes.txt"),
            "give another --out, or move this away",
            [other_out, lambda out: (away(state(out)), begin(out))],
        ),
        (earlier, "give another --out, or --fresh to replace it", [other_out, with_fresh]),
        (
            lambda out: begin(out, merge=OTHER),
            "complete that merge, or discard its state with --fresh",
            [lambda out: begin(out, merge=OTHER), with_fresh],
        ),
        (damage, "discard the state of the run with --fresh", [with_fresh]),
        (linked, "remove the link", [lambda out: ((state(out) / "samples.json").unlink(), begin(out)), other_out]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_followed_the_run_begins(
    tmp_path: Path, spoil: Callable[[Path], Any], named: str, ways: list[Callable[[Path], Any]]
) -> None:
    for number, way in enumerate(ways):
        out = tmp_path / str(number) / "merged"
        out.parent.mkdir()
        spoil(out)
        with pytest.raises(MergeError) as caught:
            begin(out)
        assert named in caught.value.do, str(caught.value)
        way(out)
        mine = [path for path in out.parent.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
        assert bool(mine) == (out.is_file() or bool(list(out.parent.rglob("notes.txt"))))


def test_an_output_with_more_than_the_merge_is_replaced_once_the_rest_is_moved_away(tmp_path: Path) -> None:
    out = tmp_path / "merged"
    earlier(out)
    put(out, "notes.txt")
    with pytest.raises(MergeError) as caught:
        begin(out, fresh=True)
    assert "move this away" in caught.value.do and "notes.txt" in caught.value.what
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    begin(out, fresh=True)


def test_inputs_that_changed_are_restored_or_the_state_is_discarded(tmp_path: Path) -> None:
    out, now = tmp_path / "merged", changed_input()
    begin(out)
    with pytest.raises(MergeError) as caught:
        begin(out, merge=now)
    assert re.search("restore it, or discard .* --fresh", caught.value.do)
    begin(out)
    begin(out, fresh=True, merge=now)
    begin(out, merge=now)


def test_a_name_that_is_too_long_may_be_shortened(tmp_path: Path) -> None:
    with pytest.raises(MergeError) as caught:
        begin(tmp_path / ("x" * 253))
    assert "shorter --out" in caught.value.do
    begin(tmp_path / ("x" * 100))
