"""Results of an evaluation as rows of a parquet file."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from engine.errors import OutputError
from engine.storage.address import check_no_secret
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder, check_creatable
from engine.storage.paths import is_uri, locate, open_folder
from engine.storage.scores import MARK, is_scores
from engine.untrusted import check_regular

SCHEMA = pa.schema(
    {
        **{"model": pa.string(), "data": pa.string(), "metric": pa.string()},
        **{"value": pa.float64(), "count": pa.int64(), "expert": pa.string()},
    }
)


@dataclass(frozen=True)
class Row:
    """The value of `metric` for `model` on `data`, a mean over `count` records or tokens.

    `expert` is the model to which the data belongs, None without one.
    """

    model: str
    data: str
    metric: str
    value: float
    count: int
    expert: str | None = None


def results_file(out: str) -> tuple[Folder, str]:
    """Return the folder of the results and the file's name in it. Creates nothing.

    Raises:
        OutputError: the name does not end in .parquet, something other than earlier results has it, or no file can be
            created there.
    """
    folder, name = _place(out)
    check_replaceable(folder, name)
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


def as_table(rows: Sequence[Row]) -> pa.Table:
    """Return the rows as a table with SCHEMA's columns."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA.with_metadata(MARK))


def save_results(rows: Sequence[Row], folder: Folder, name: str) -> None:
    """Write all rows to a parquet file with SCHEMA's columns. The file is complete or absent.

    Raises:
        OutputError: the name belongs to something other than earlier results.
    """
    # Again, because an evaluation takes long, and another program may have written a file of this name.
    check_replaceable(folder, name)
    data = io.BytesIO()
    pyarrow.parquet.write_table(as_table(rows), data)
    folder.write(name, data.getvalue())


def check_replaceable(folder: Folder, name: str) -> None:
    """Check that a name is free for results, or that of earlier results.

    Raises:
        OutputError: something else has it.
    """
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
