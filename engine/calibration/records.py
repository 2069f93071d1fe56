"""Read calibration records from .json, .jsonl and .parquet files of bounded size.

`engine.calibration.forms` describes the fields of a record. For models that take images it may also have `image_path`
or `image_paths`, or paths in the parts of its messages. Other fields are ignored. Images are located, but not read.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from engine.calibration.forms import FIELDS, READ, checked, field_of, no_field, without_none
from engine.config.schema import CalibrationFile
from engine.errors import CalibrationError
from engine.planning.plan import ExpertPlan, Plan
from engine.storage.paths import locate
from engine.untrusted import (
    JSON_BYTES,
    library_errors_as,
    memory_limit,
    open_regular,
    parse_json,
    read_text,
    shown,
)

# The byte order mark, which some editors write before UTF-8 text.
MARK = "\ufeff"

# Maximum bytes of a record, records of a file and images of a record; rows of a parquet file read at a time.
RECORD_BYTES, RECORDS, IMAGES, ROWS = 2 << 20, 1_000_000, 64, 64


@dataclass(frozen=True)
class Record:
    """A calibration record.

    Attributes:
        where: File and line or number, for errors.
        fields: Its fields.
        loss_weight: βₖ, or the `loss_weight` of its file.
        images: Files of its images, in the order of their places in the text.
        image_options: Options of the image processor.
    """

    where: str
    fields: Mapping[str, Any]
    loss_weight: float
    images: tuple[Path, ...] = ()
    image_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def field(self) -> str:
        """The field of FIELDS that is used."""
        name = field_of(self.fields)
        assert name is not None
        return name


def read_records(plan: Plan) -> list[list[Record]]:
    """Read the calibration records of each expert.

    A file with `samples` contributes that many records; the other files of the expert contribute `samples_per_model`
    together. Records are taken from the files in turn, one at a time. `shuffle` permutes each file with the seed first.

    Returns:
        The records of each expert.

    Raises:
        CalibrationError: A file cannot be read or has no records, or a record is not valid.
    """
    return [_of_expert(plan, number) for number in range(len(plan.experts))]


def read_file(path: Path, limit: int | None = None) -> list[Record]:
    """Read the records of one file, at most `limit`. Paths of images are relative to the file's folder.

    Raises:
        CalibrationError: See `read_records`.
    """
    records = []
    for where, fields in islice(_checked(path), limit):
        images = tuple(_image([path.parent], name, where) for name in _image_names(fields, where))
        records.append(Record(where, fields, 1.0, images))
    if not records:
        raise CalibrationError("the file has no records", str(path))
    return records


def text_of(fields: Mapping[str, Any]) -> str:
    """Return all text of a record, to estimate its number of tokens."""
    return "".join(str(fields[field]) for field in (*FIELDS, "response", "completion", "tools") if fields.get(field))


def _of_expert(plan: Plan, number: int) -> list[Record]:
    expert, sources = plan.experts[number], plan.config.models[number].calibration
    budget, chosen = expert.samples, []
    if not sources:
        # Its statistics come from files.
        return []
    files = [
        [_record(plan, expert, source, path, where, fields) for where, fields in _chosen(plan, expert, place, source)]
        for place, (source, path) in enumerate(zip(sources, expert.calibration, strict=True))
    ]
    if not any(files):
        raise CalibrationError(f"expert {expert.name!r} has no calibration records", str(expert.calibration[0]))
    shared = {id(file) for file, source in zip(files, sources, strict=True) if source.samples is None}
    for turn in zip_longest(*files):
        for file, record in zip(files, turn, strict=True):
            if record is None:
                continue
            if id(file) in shared:
                if not budget:
                    continue
                budget -= 1
            chosen.append(record)
    return chosen


def _chosen(plan: Plan, expert: ExpertPlan, place: int, source: CalibrationFile) -> list[tuple[str, Any]]:
    """Return the first records of a file and their places, after `shuffle`, as many as the expert may take."""
    path, wanted = expert.calibration[place], source.samples or expert.samples
    count, kept = 0, []
    for entry in _checked(path):
        count += 1
        if count <= wanted:
            kept.append(entry)
    if plan.config.calibration.shuffle:
        order = list(range(count))
        # Seeded per expert and file, so that an additional file or expert does not change the samples of the others.
        seed = f"{plan.config.seed}-{plan.experts.index(expert)}"
        random.Random(f"{seed}-{place}" if place else seed).shuffle(order)
        turns = {number: turn for turn, number in enumerate(order[:wanted])}
        by_turn = {turns[i]: entry for i, entry in enumerate(_checked(path)) if i in turns}
        kept = [by_turn[turn] for turn in sorted(by_turn)]
    return kept


def _record(
    plan: Plan, expert: ExpertPlan, source: CalibrationFile, path: Path, where: str, fields: Mapping[str, Any]
) -> Record:
    names = _image_names(fields, where)
    check_seen(names, plan.base_header.takes_images, where)
    assert plan.config.calibration.image_folder is not None
    folders = [path.parent, Path(plan.config.calibration.image_folder)]
    return Record(
        where=where,
        fields=fields,
        loss_weight=expert.loss_weight if source.loss_weight is None else source.loss_weight,
        images=tuple(_image(folders, name, where) for name in names),
        image_options=plan.config.calibration.image_options | source.image_options,
    )


def check_seen(images: Sequence[Any], takes_images: bool, where: str) -> None:
    """Check that a record has no images if the model takes none.

    Raises:
        CalibrationError: The record has images, and the model takes none.
    """
    if images and not takes_images:
        raise CalibrationError("the record has images, but the model takes none", where)


def _image_names(fields: Mapping[str, Any], where: str) -> list[str]:
    """Return the paths of a record's images, from its image fields or from the parts of its messages."""
    given = [fields[name] for name in ("image_path", "image_paths") if fields.get(name) is not None]
    names = list(chain.from_iterable(value if isinstance(value, list) else [value] for value in given))
    parts = [part for part in _parts(fields) if part.get("type") == "image"]
    named = [part[key] for part in parts for key in ("path", "image", "url") if part.get(key) is not None]
    if len(given) > 1 or (named and (names or len(named) < len(parts))):
        raise CalibrationError(
            "the record gives its images in two ways", where, "all in `image_paths`, or all in parts of the messages"
        )
    names = names or named
    if not all(isinstance(name, str) and name for name in names) or len(names) > IMAGES:
        raise CalibrationError("the images are not a list of paths", where, f"at most {IMAGES} paths of files")
    if names and field_of(fields) in ("input_ids", "text", "prompt"):
        raise CalibrationError(f"the record has images and `{field_of(fields)}`", where, "`question` or `messages`")
    return names


def _parts(fields: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Return the parts of all messages whose content is a list."""
    messages = fields.get("messages") if field_of(fields) == "messages" else None
    contents = [message["content"] for message in messages or () if isinstance(message["content"], list)]
    return [part for content in contents for part in content if isinstance(part, dict)]


def _image(folders: Sequence[Path], name: str, where: str) -> Path:
    """Return the file of an image, relative to the first of the folders that has it."""
    if "://" in name:
        raise CalibrationError(f"the image is given by address: {shown(repr(name))}", where, "the path of a file")
    try:
        candidates = [locate(name, folder, CalibrationError) for folder in folders]
    except CalibrationError as error:
        problem = f"the image {shown(repr(name))} cannot be located: {error.what}"
        raise CalibrationError(problem, where, "the path of a file") from error
    # os.path.isfile returns False for impossible names, where Path.is_file raises.
    file = next((path for path in candidates if os.path.isfile(path)), None)  # noqa: PTH113
    if file is None:
        searched = " or ".join(dict.fromkeys(str(folder) for folder in folders))
        raise CalibrationError(f"no such image: {shown(repr(name))}", where, f"a file, relative to {searched}")
    return file


def _checked(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file with their places, after checking each."""
    for count, (where, record) in enumerate(_read_file(path), start=1):
        if count > RECORDS:
            raise _too_many(path)
        yield where, checked(record, where)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file with their places: `FILE:LINE` in .jsonl, `FILE record N` elsewhere, from 1."""
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    if path.suffix == ".json":
        text = read_text(path, JSON_BYTES, CalibrationError).removeprefix(MARK)
        if text.lstrip()[:1] not in ("[", ""):
            raise CalibrationError(
                "the file is not a list of records", str(path), do="if each line is a record, name the file .jsonl"
            )
        rows = parse_json(text, str(path), CalibrationError)
    elif path.suffix == ".parquet":
        rows = _rows(path)
    else:
        raise CalibrationError(f"unknown file type {path.suffix!r}", str(path), ".json, .jsonl or .parquet")
    for number, row in enumerate(rows, start=1):
        where = f"{path} record {number}"
        if len(repr(row)) > RECORD_BYTES:
            raise _too_long(where)
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_regular(path, None, CalibrationError) as file:
        number = 0
        while line := file.readline(RECORD_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if number > RECORDS:
                raise _too_many(path)
            if len(line) > RECORD_BYTES:
                raise _too_long(where)
            try:
                text = line.decode("utf-8").removeprefix(MARK if number == 1 else "")
            except UnicodeDecodeError as error:
                raise CalibrationError("the file is not UTF-8 text", str(path), do="save it as UTF-8") from error
            if text.lstrip().startswith("["):
                raise CalibrationError(
                    "the line begins a list",
                    where,
                    "one record, a mapping of fields to values",
                    "if the whole file is a list of records, name it .json",
                )
            if text.strip():
                yield where, parse_json(text, where, CalibrationError)


def _rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a parquet file, reading ROWS at a time within `memory_limit`: small files can expand a lot."""
    import pyarrow
    import pyarrow.parquet

    too_large = CalibrationError(
        "the records take too much memory", str(path), do="keep only the records that are needed"
    )
    unread = library_errors_as(lambda message: CalibrationError(f"not a parquet file: {message}", str(path)))
    with open_regular(path, None, CalibrationError) as file:
        with unread, memory_limit(too_large):
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            names = table.schema_arrow.names
            batches = table.iter_batches(ROWS, columns=[name for name in names if name in READ], use_threads=False)
        if not any(name in READ for name in names):
            raise no_field(names, f"{path} record 1")
        if len(set(names)) < len(names):
            raise CalibrationError("two columns have the same name", str(path))
        if table.metadata.num_rows > RECORDS:
            raise _too_many(path)
        rows: list[Any] | None = []
        while rows is not None:
            yield from rows
            wrong = library_errors_as(
                lambda message: CalibrationError(f"the records cannot be read: {message}", str(path))
            )
            with wrong, memory_limit(too_large):
                batch = next(batches, None)
                rows = None if batch is None else without_none(batch.to_pylist())


def _too_many(path: Path) -> CalibrationError:
    return CalibrationError(
        f"the file has more than {RECORDS:,} records or lines", str(path), do="keep only the records that are needed"
    )


def _too_long(where: str) -> CalibrationError:
    return CalibrationError("the record is too long", where, f"at most {RECORD_BYTES:,} bytes")


Records = Sequence[Sequence[Record]]
