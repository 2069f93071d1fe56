"""Reports on output folders of strangers through the command line: one message, bounded time and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import plan_of
from hostile import Server, refused
from hostile_inputs import MB, Cases, Spoil, bomb, cases, link, make_folder, pipe, put, repeated
from recorded_merges import write_merge

from engine.evaluation.results import Row, save_results
from engine.report import page
from engine.storage.local_folder import LocalFolder

CONFIG, MEMORY, EVALUATION = "m/merge/config.yaml", "m/merge/memory.json", "m/merge/evaluation.parquet"
COEFFICIENTS, IMPORTANCE, METRICS = (f"m/merge/{name}.parquet" for name in ("coefficients", "importance", "metrics"))


def recorded(folder: Path, extra: str) -> None:
    """Append lines to the recorded config."""
    put(folder, CONFIG, f"{(folder / CONFIG).read_text()}{extra}\n")


def edited(folder: Path, old: str, new: str) -> None:
    text = (folder / CONFIG).read_text()
    assert old in text
    put(folder, CONFIG, text.replace(old, new))


def elsewhere(folder: Path) -> str:
    """Move the recorded config out of the folder, and return its path from `merge/`."""
    put(folder, "others/x", (folder / CONFIG).read_text())
    return "../../others/x"


def linked_folder(folder: Path) -> None:
    (folder / "others").mkdir()
    (folder / "m" / "merge").rename(folder / "others" / "merge")
    (folder / "m" / "merge").symlink_to("../others/merge")


def columns(folder: Path, name: str, rows: int, **changes: Any) -> None:
    """Write a table of equal rows, with other columns for some."""
    fields = pyarrow.parquet.read_schema(folder / name)
    table = {}
    for field in fields:
        zeros = repeated("x", rows) if pa.types.is_string(field.type) else pa.array(np.zeros(rows)).cast(field.type)
        table[field.name] = changes.get(field.name, zeros)
    options = {"store_schema": False, "compression": "zstd", "dictionary_pagesize_limit": 2**30}
    pyarrow.parquet.write_table(pa.table(table), folder / name, **options)
    assert (folder / name).stat().st_size < 1_000_000


def scores(folder: Path, rows: list[Row]) -> None:
    save_results(rows, LocalFolder((folder / EVALUATION).parent), "evaluation.parquet")


REPORTS: Cases = {
    "billion laughs": (lambda f: recorded(f, bomb("unknown").replace("record:", "r:")), [CONFIG, "500,000 values"]),
    "billion laughs as the seed": (
        lambda f: (edited(f, "seed: 0", "seed: 1"), put(f, CONFIG, f"{bomb('x')}\n{(f / CONFIG).read_text()}")),
        [CONFIG, "500,000 values"],
    ),
    "config of 40 MB": (lambda f: recorded(f, "#" * 40 * MB), [CONFIG, "33,554,432"]),
    "call of Python": (lambda f: recorded(f, "a: !!python/object/apply:os.mkdir [x]"), [CONFIG, "apply:os.mkdir"]),
    "config that is a list": (lambda f: put(f, CONFIG, "[1]"), [CONFIG, "mapping"]),
    "record that is a list": (lambda f: edited(f, "\nrecord:\n", "\nrecord: []\nr:\n"), [CONFIG, "ValidationError"]),
    "config without a record": (lambda f: edited(f, "\nrecord:\n", "\nr:\n"), [CONFIG, "'record'"]),
    "config that is a pipe": (lambda f: pipe(f, CONFIG), ["m: ", "merge/config.yaml"]),
    "config that is a folder": (lambda f: make_folder(f, CONFIG), ["m: ", "merge/config.yaml"]),
    "pipe": (lambda f: pipe(f, MEMORY), [MEMORY, "pipe"]),
    "table that is a pipe": (lambda f: pipe(f, COEFFICIENTS), [COEFFICIENTS, "pipe"]),
    "scores that are a pipe": (lambda f: pipe(f, EVALUATION), [EVALUATION, "pipe"]),
    "endless device": (lambda f: link(f, MEMORY, "/dev/zero"), [MEMORY, "/dev/zero"]),
    "link to another's scores": (lambda f: link(f, EVALUATION, elsewhere(f)), [EVALUATION, "others/x"]),
    "link to another's record": (lambda f: link(f, CONFIG, elsewhere(f)), [CONFIG, "others/x"]),
    "folder that is a link": (linked_folder, [CONFIG, "others/merge"]),
    "table that is a folder": (lambda f: make_folder(f, METRICS), [METRICS, "directory"]),
    "link to nothing": (lambda f: link(f, METRICS, "gone"), [METRICS, "No such file"]),
    "link to itself": (lambda f: link(f, METRICS, "metrics.parquet"), [METRICS, "symbolic links"]),
    "memory of 40 MB": (lambda f: put(f, MEMORY, "{" + " " * 40 * MB + "}"), [MEMORY, "33,554,432"]),
    "memory that is UTF-16": (lambda f: put(f, MEMORY, "{}".encode("utf-16")), [MEMORY, "UTF-8"]),
    "6 million coefficients": (lambda f: columns(f, COEFFICIENTS, 6_000_000), [COEFFICIENTS, "6,000,000 rows"]),
    "6 million losses": (lambda f: columns(f, METRICS, 6_000_000), [METRICS, "6,000,000 rows"]),
    "a million scores": (
        lambda f: (scores(f, [Row("a", "b", "c", 0, 0)]), columns(f, EVALUATION, 1_000_000)),
        [EVALUATION, "1,000,000 rows", "100,000"],
    ),
    "20 GB of names": (
        lambda f: columns(f, IMPORTANCE, 20_000, tensor=repeated("a" * MB, 20_000)),
        ["m: ", "memory"],
    ),
    "a hundred stages": (
        lambda f: columns(f, COEFFICIENTS, 100, stage=pa.array(range(100), pa.int8())),
        [COEFFICIENTS, "stages"],
    ),
    "stages of losses": (
        lambda f: columns(f, METRICS, 1000, stage=pa.array(range(1000), pa.int16())),
        [METRICS, "stages"],
    ),
    "tensors of unknown size": (
        lambda f: columns(f, IMPORTANCE, 3, numel=pa.array([None] * 3, pa.int64())),
        ["m: ", "NoneType"],
    ),
    "scores of one model twice": (
        lambda f: scores(f, [Row("a\x1b[31m", "b", "c", 0.5, 1)] * 2),
        [EVALUATION, "a\\x1b[31m, b, c"],
    ),
}

LONG = "x" * 300


@pytest.fixture(scope="module")
def made(llama_merge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of a merge."""
    folder = tmp_path_factory.mktemp("reports")
    write_merge(plan_of(llama_merge), folder / "m")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the output of a merge, for the test to corrupt."""
    return shutil.copytree(made, tmp_path / "in")


@cases(every=2, report=REPORTS)
def test_a_hostile_output_folder_is_refused(planner: Server, folder: Path, spoil: Spoil, facts: list[str]) -> None:
    spoil(folder)
    refused(planner.run("report", "m", cwd=folder), facts, memory=page.MEMORY)


@pytest.mark.parametrize("name", [LONG, "a\x1b[31mb", "/proc/self/fd/0", "gone"])
def test_a_name_of_no_output_folder_is_refused(planner: Server, folder: Path, name: str) -> None:
    ended = planner.run("report", name, cwd=folder)
    refused(ended, ["merge/config.yaml"])
    assert "\x1b" not in ended.stderr


@pytest.mark.parametrize("target", ["notes.html", "m/merge/config.yaml", "pipe", "m"])
def test_a_report_replaces_only_reports(planner: Server, folder: Path, target: str) -> None:
    (folder / "notes.html").write_text("<!doctype html>\n<title>mine</title>")
    pipe(folder, "pipe")
    refused(planner.run("report", "m", "--out", target, cwd=folder), [f"in/{target}"])


def test_a_report_replaces_an_earlier_one(planner: Server, folder: Path) -> None:
    for _ in range(2):
        ended = planner.run("report", "m", "--out", "new/r.html", cwd=folder)
        assert ended.code == 0, ended.stderr
    assert json.dumps(str(folder)) not in (folder / "new" / "r.html").read_text()
