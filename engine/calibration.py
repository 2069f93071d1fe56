"""Unlabelled samples: records from .json, .jsonl and .parquet files, made into token ids, in the method's order.

A record has `input_ids`, or `messages` (chat), or `question` (and `response`, used when present), or `text`; other
fields are kept and ignored. Reading and checking records needs no torch and no tokenizer. Knows nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CalibrationError
from engine.plan import Plan
from engine.untrusted import (
    JSON_BYTES,
    SHOWN,
    foreign,
    in_memory,
    in_time,
    open_regular,
    parse_json,
    read_text,
    shown,
)

Record = dict[str, Any]
# In the order of precedence: the first that a record has decides what is made of it.
FIELDS = ("input_ids", "messages", "question", "text")
READ = {*FIELDS, "response", "image_path", "image_paths"}
# Bytes of a record, records of an expert, and how many of a table are read at a time.
RECORD_BYTES, RECORDS, ROWS = 2 << 20, 1_000_000, 64


@dataclass(frozen=True)
class Sample:
    """One calibration sample x ∈ Dₖ: `expert` is k, `index` its place in the list, `where` its file and record.

    `cut` is the number of tokens beyond `max_length` that were left out; `generate` the number of new tokens that the
    expert writes first, as the response to this prompt.
    """

    expert: int
    index: int
    input_ids: tuple[int, ...]
    where: str
    cut: int = 0
    generate: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the sample, or as many as it may have when the expert has written its response."""
        return len(self.input_ids) + self.generate


def read_records(plan: Plan) -> list[list[tuple[str, Record]]]:
    """For each expert its calibration records, each with its place, at most `samples_per_model` of them.

    With `shuffle`, the list of each expert is permuted with the seed before its first records are taken.

    Raises:
        CalibrationError: a file that cannot be read or is empty, or a record without a usable field.
    """
    chosen = []
    for number, expert in enumerate(plan.experts):
        count, kept = 0, []
        for place in _read_files(expert.calibration):
            count += 1
            if count <= expert.samples:
                kept.append(place)
        if not count:
            raise CalibrationError(f"expert {expert.name!r} has no calibration records", str(expert.calibration[0]))
        if plan.config.calibration.shuffle:
            order = list(range(count))
            # Seeded per expert, so that adding an expert does not change the samples of the others.
            random.Random(f"{plan.config.seed}-{number}").shuffle(order)
            wanted = {place: turn for turn, place in enumerate(order[: expert.samples])}
            found = {wanted[i]: one for i, one in enumerate(_read_files(expert.calibration)) if i in wanted}
            kept = [found[turn] for turn in sorted(found)]
        chosen.append(kept)
    return chosen


def about_tokens(plan: Plan, records: Sequence[Sequence[tuple[str, Record]]]) -> list[list[int]]:
    """About how many tokens each sample has, without a tokenizer: four characters of a text make one."""
    calibration = plan.config.calibration

    def count(record: Record) -> int:
        ids = record.get("input_ids")
        text = "".join(str(record[field]) for field in (*FIELDS, "response") if record.get(field))
        tokens = len(ids) if ids is not None else len(text) // 4 + 1 + calibration.generate_responses
        return min(tokens, calibration.max_length)

    return [[count(record) for _, record in mine] for mine in records]


def tokenize(records: Sequence[Sequence[tuple[str, Record]]], tokenizer: Any, plan: Plan) -> list[list[Sample]]:
    """Samples of each expert; `tokenizer` is the base's, from transformers, or None where no record needs one.

    Raises:
        CalibrationError: a record that makes no tokens, ids outside the vocabulary, or chat without a chat template.
    """
    vocabulary = plan.base_header.vocab_size
    samples: list[list[Sample]] = []
    for number, mine in enumerate(records):
        samples.append([])
        for index, (where, record) in enumerate(mine):
            ids, is_prompt = _token_ids(record, tokenizer, where)
            if not ids:
                raise CalibrationError("the record makes no tokens", where)
            if not 0 <= min(ids) <= max(ids) < (vocabulary or max(ids) + 1):
                least, most = shown(str(min(ids))), shown(str(max(ids)))
                raise CalibrationError(
                    f"token ids from {least} to {most}", where, f"ids below the vocabulary's size, {vocabulary}"
                )
            options = plan.config.calibration
            kept, cut = tuple(ids[: options.max_length]), max(0, len(ids) - options.max_length)
            generate = min(options.generate_responses, options.max_length - len(kept)) if is_prompt else 0
            samples[-1].append(Sample(number, index, kept, where, cut, generate))
    return samples


def training_order(counts: Sequence[int], epochs: int) -> list[tuple[int, int]]:
    """The order of samples, as (expert, index): round robin over the experts, a shorter list starting again until the
    longest is done; that once an epoch.
    """
    longest = max(counts)
    once = [(expert, turn % count) for turn in range(longest) for expert, count in enumerate(counts)]
    return once * epochs


def windows(order: Sequence[tuple[int, int]], size: int) -> list[Sequence[tuple[int, int]]]:
    """The order cut into windows of `size` samples, one optimiser step each; the last holds what is left."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def passes(tokens: Sequence[int], limit: int) -> list[list[int]]:
    """Which samples of a window go through the model together, by their places in it; `tokens` are theirs.

    As many as have, filled up to the longest of them, no more tokens than `limit`, or than the window's longest sample
    where that has more. The longest come first, so that little is filled up.
    """
    limit = max(limit, *tokens)
    together: list[list[int]] = []
    for place in sorted(range(len(tokens)), key=lambda place: -tokens[place]):
        if together and tokens[together[-1][0]] * (len(together[-1]) + 1) <= limit:
            together[-1].append(place)
        else:
            together.append([place])
    return together


def needs_tokenizer(records: Sequence[Sequence[tuple[str, Record]]]) -> bool:
    """Whether any record is text."""
    return any(_field(record) != "input_ids" for mine in records for _, record in mine)


def _read_files(paths: Sequence[Path]) -> Iterator[tuple[str, Record]]:
    """Records of an expert's files with their places, one after the other, each looked at: one usable field."""
    count = 0
    for path in paths:
        for where, record in _read_file(path):
            count += 1
            if count > RECORDS:
                raise _too_many(path)
            _check(record, where)
            yield where, record


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of one file with their places; `FILE:LINE` in .jsonl, `FILE record N` elsewhere, from 1."""
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    if path.suffix == ".json":
        rows = parse_json(read_text(path, JSON_BYTES, CalibrationError), str(path), CalibrationError)
        if not isinstance(rows, list):
            raise CalibrationError("the file does not hold a list of records", str(path))
    elif path.suffix == ".parquet":
        rows = _rows(path)
    else:
        raise CalibrationError(f"an unknown kind of file: {path.suffix!r}", str(path), ".json, .jsonl or .parquet")
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
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationError("the file is not UTF-8 text", str(path)) from error
            if text.strip():
                yield where, parse_json(text, where, CalibrationError)


def _rows(path: Path) -> Iterator[Any]:
    """Rows of a parquet file, a few at a time. A small file may stand for a large table: see `in_memory`."""
    import pyarrow
    import pyarrow.parquet

    too_large = CalibrationError("its records take too much memory", str(path), do="give only those that are needed")
    unread = foreign(lambda told: CalibrationError(f"not a parquet file: {told}", str(path)))
    with open_regular(path, None, CalibrationError) as file:
        with unread, in_memory(too_large):
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            names = table.schema_arrow.names
            batches = table.iter_batches(ROWS, columns=[name for name in names if name in READ], use_threads=False)
        if not any(name in READ for name in names):
            raise _no_field(names, f"{path} record 1")
        if len(set(names)) < len(names):
            raise CalibrationError("two of its columns have one name", str(path))
        if table.metadata.num_rows > RECORDS:
            raise _too_many(path)
        rows: list[Any] | None = []
        while rows is not None:
            yield from rows
            wrong = foreign(lambda told: CalibrationError(f"its records cannot be read: {told}", str(path)))
            with wrong, in_memory(too_large):
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()


def _too_many(path: Path) -> CalibrationError:
    return CalibrationError(f"more than {RECORDS:,} records or lines", str(path), "5–10 of the expert's domain")


def _too_long(where: str) -> CalibrationError:
    return CalibrationError("the record is too long", where, f"at most {RECORD_BYTES:,} bytes")


def _no_field(fields: Sequence[str], where: str) -> CalibrationError:
    has = shown(", ".join(fields), 4 * SHOWN)
    return CalibrationError(
        f"the record has no usable field; it has {has or 'none'}", where, f"one of {', '.join(FIELDS)}"
    )


def _field(record: Record) -> str | None:
    return next((field for field in FIELDS if record.get(field) is not None), None)


def _check(record: Any, where: str) -> None:
    """One usable field, of the type that it must have."""
    if not isinstance(record, dict):
        raise CalibrationError("the record is not a mapping of fields to values", where)
    field = _field(record)
    if field is None:
        raise _no_field(list(map(str, record)), where)
    if record.get("image_path") is not None or record.get("image_paths") is not None:
        raise CalibrationError("the record has images, and this is a language model without them", where)
    value, response = record[field], record.get("response")
    if field == "input_ids" and not (isinstance(value, list) and all(type(token) is int for token in value)):
        raise CalibrationError("`input_ids` is not a list of integers", where)
    if field == "messages" and not (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    ):
        raise CalibrationError("`messages` is not a list of {role, content}", where)
    if field in ("question", "text") and not (isinstance(value, str) and value.strip()):
        raise CalibrationError(f"`{field}` is not a text, or an empty one", where)
    if field == "question" and not (response is None or isinstance(response, str)):
        raise CalibrationError("`response` is not a text", where)


def _token_ids(record: Record, tokenizer: Any, where: str) -> tuple[list[int], bool]:
    """The record's tokens, and whether they are a prompt that still wants a response."""
    import jinja2

    if _field(record) == "input_ids":
        return list(record["input_ids"]), False
    who = "tokenizer" if _field(record) == "text" or not tokenizer.chat_template else "chat template"
    with foreign(
        lambda told: CalibrationError(f"the {who} does not take this record: {told}", where), jinja2.TemplateError
    ):
        return _tokenized(record, tokenizer, where)


def _tokenized(record: Record, tokenizer: Any, where: str) -> tuple[list[int], bool]:
    field, response = _field(record), record.get("response")
    if field == "text":
        return list(tokenizer(record["text"]).input_ids), False
    if field == "messages":
        messages = record["messages"]
        if not tokenizer.chat_template:
            raise CalibrationError("the record is a chat, and the base's tokenizer has no chat template", where)
    elif tokenizer.chat_template:
        messages = [{"role": "user", "content": record["question"]}]
        messages += [{"role": "assistant", "content": response}] if response else []
    else:
        text = "\n".join([record["question"], *([response] if response else [])])
        return list(tokenizer(text).input_ids), not response
    is_prompt = messages[-1]["role"] != "assistant"
    endless = CalibrationError("the chat template takes too long, or too much memory", where)
    with in_time(endless), in_memory(endless):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=is_prompt, tokenize=False)
    if len(text) > RECORD_BYTES:
        raise CalibrationError(f"the chat template makes {len(text):,} characters", where, f"at most {RECORD_BYTES:,}")
    return list(tokenizer(text, add_special_tokens=False).input_ids), is_prompt
