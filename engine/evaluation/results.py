"""Figures of an evaluation as rows: a parquet file, and a table for a person. Knows nothing of how they are found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import rich.box
import rich.console
import rich.table

from engine.errors import OutputError
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import is_uri, locate, open_folder

SCHEMA = pa.schema(
    {"model": pa.string(), "data": pa.string(), "metric": pa.string(), "value": pa.float64(), "count": pa.int64()}
)


@dataclass(frozen=True)
class Row:
    """One figure: `metric` of `model` on `data`. `count`: of how many records, or tokens, it is a mean."""

    model: str
    data: str
    metric: str
    value: float
    count: int


def results_file(out: str) -> tuple[Folder, str]:
    """Where results go: the folder and the file's name in it. Nothing is made yet.

    Raises:
        OutputError: no parquet file can have that name.
    """
    if not out.endswith(".parquet"):
        raise OutputError("results are a parquet file", out, "a name that ends in .parquet")
    if is_uri(out):
        above, _, name = out.rpartition("/")
        return open_folder(above), name
    path = locate(out, Path.cwd(), OutputError)
    if path.is_dir():
        raise OutputError("results are a file, and this is a folder", str(path))
    return LocalFolder(path.parent), path.name


def save_results(rows: Sequence[Row], folder: Folder, name: str) -> None:
    """All rows as a parquet file with SCHEMA's columns, there whole or not at all."""
    data = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), data)
    folder.write(name, data.getvalue())


def print_results(rows: Sequence[Row]) -> None:
    """A table for each data, the models under each other and the metrics beside each other."""
    console = rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for data in dict.fromkeys(row.data for row in rows):
        mine = {(row.model, row.metric): row for row in rows if row.data == data}
        metrics = list(dict.fromkeys(metric for _, metric in mine))
        table = rich.table.Table(box=rich.box.SIMPLE)
        table.add_column(data, overflow="fold")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for model in dict.fromkeys(model for model, _ in mine):
            found = (mine.get((model, metric)) for metric in metrics)
            table.add_row(model, *("" if row is None else f"{row.value:.4g}" for row in found))
        console.print(table)
