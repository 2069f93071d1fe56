"""Results of an evaluation as rows: written to a parquet file, and printed as tables."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import rich.box
import rich.console
import rich.table

from engine.errors import OutputError
from engine.storage.address import check_no_secret
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder, check_creatable
from engine.storage.paths import is_uri, locate, open_folder
from engine.storage.scores import MARK, is_scores
from engine.untrusted import check_regular

SCHEMA = pa.schema(
    {"model": pa.string(), "data": pa.string(), "metric": pa.string(), "value": pa.float64(), "count": pa.int64()}
)


@dataclass(frozen=True)
class Row:
    """The value of `metric` for `model` on `data`, a mean over `count` records or tokens."""

    model: str
    data: str
    metric: str
    value: float
    count: int


def results_file(out: str) -> tuple[Folder, str]:
    """Return the folder of the results and the file's name in it. Creates nothing.

    Raises:
        OutputError: the name does not end in .parquet, something other than earlier results has it, or no file can be
            created there.
    """
    folder, name = _place(out)
    _check_replaceable(folder, name)
    return folder, name


def _place(out: str) -> tuple[Folder, str]:
    if is_uri(out):
        check_no_secret(out, OutputError)
    if not out.endswith(".parquet"):
        raise OutputError("the results are written as a parquet file", out, "a name that ends in .parquet")
    if is_uri(out):
        above, _, name = out.rpartition("/")
        return open_folder(above), name
    path = locate(out, Path.cwd(), OutputError)
    if os.path.isdir(path):  # noqa: PTH112 - false, not an error, for a name that no file can have
        raise OutputError("the file for the results is a folder", str(path), do="give another --out")
    check_creatable(path, "give another --out")
    return LocalFolder(path.parent), path.name


def save_results(rows: Sequence[Row], folder: Folder, name: str) -> None:
    """Write all rows to a parquet file with SCHEMA's columns. The file is complete or absent.

    Raises:
        OutputError: the name belongs to something other than earlier results.
    """
    # Again, because an evaluation takes long, and another program may have written a file of this name.
    _check_replaceable(folder, name)
    data = io.BytesIO()
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA.with_metadata(MARK))
    pyarrow.parquet.write_table(table, data)
    folder.write(name, data.getvalue())


def _check_replaceable(folder: Folder, name: str) -> None:
    where = f"{folder.where}/{name}"
    if isinstance(folder, LocalFolder):
        if not os.path.lexists(where):
            return
        check_regular(Path(where), None, OutputError, "the file for the results")
    elif not folder.exists(name):
        return
    if not is_scores(folder, name):
        raise OutputError(
            "the file for the results exists and was not written by this version of `evaluate`",
            where,
            do="give another --out, or remove the file",
        )


def print_results(rows: Sequence[Row]) -> None:
    """Print one table per data set, with a row per model and a column per metric."""
    console = rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for data in dict.fromkeys(row.data for row in rows):
        cells = {(row.model, row.metric): row for row in rows if row.data == data}
        metrics = list(dict.fromkeys(metric for _, metric in cells))
        table = rich.table.Table(box=rich.box.SIMPLE)
        table.add_column(data, overflow="fold")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for model in dict.fromkeys(model for model, _ in cells):
            values = (cells.get((model, metric)) for metric in metrics)
            table.add_row(model, *("" if row is None else f"{row.value:.4g}" for row in values))
        console.print(table)
