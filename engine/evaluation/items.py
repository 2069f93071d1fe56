"""The data of an evaluation: records of data files as items of one kind each.

A record with a response is an item of kind `response`, a record with choices of kind `choice`, any other of kind
`text`. Does not need torch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.calibration.forms import answer_of
from engine.calibration.records import Record, read_file, text_of
from engine.checkpoints.find import ModelName
from engine.errors import CalibrationError
from engine.evaluation.metrics import LETTERS
from engine.storage.cache import fetch
from engine.storage.paths import is_uri, locate
from engine.untrusted import shown

Kind = Literal["text", "response", "choice"]


@dataclass(frozen=True)
class Item:
    """One record as a model is evaluated on it.

    Attributes:
        wholes: The texts that are scored by teacher forcing: the record, or the record with each of its choices.
        prompt: The record up to its answer; None for a text.
        response: The expected answer.
        choices: The choices, for an item of kind `choice`.
        answer: The index of the right choice.
    """

    wholes: tuple[Record, ...]
    prompt: Record | None = None
    response: str = ""
    choices: tuple[str, ...] = ()
    answer: int = 0

    @property
    def kind(self) -> Kind:
        """The kind of the item, which decides its metrics."""
        return "text" if self.prompt is None else "choice" if self.choices else "response"

    @property
    def length(self) -> int:
        """The approximate length in characters, by which items are sorted into batches."""
        return max(len(text_of(record.fields)) for record in self.wholes)


@dataclass(frozen=True)
class DataSet:
    """The items of one file, all of one kind.

    `name` is the file's stem, preceded by the folder where two stems are equal. `expert` is the model with which texts
    are compared, by names that are valid on every node.
    """

    name: str
    items: tuple[Item, ...]
    expert: ModelName | None = None

    @property
    def kind(self) -> Kind:
        """The kind of the items."""
        return self.items[0].kind


def read_data(files: Sequence[str], limit: int | None = None) -> list[DataSet]:
    """Read the items of each file, or of its first `limit` records. A file is a path or a URI.

    Raises:
        CalibrationError: a file is empty or cannot be read, a record is invalid, or a file has two kinds of records.
    """
    data = []
    for name, file in zip(names_of(files), files, strict=True):
        items = tuple(map(make_item, read_file(_located(file), limit)))
        other = next((item for item in items if item.kind != items[0].kind), None)
        if other is not None:
            raise CalibrationError(
                f"the record is of kind {other.kind}, the first record of its file of kind {items[0].kind}",
                other.wholes[0].where,
                "records of one kind in a file",
                "put each kind into a file of its own",
            )
        data.append(DataSet(name, items))
    return data


def unique(names: Sequence[str]) -> list[str]:
    """Return the names with a number appended to each repeated one."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return numbered if len(set(numbered)) == len(numbered) else unique(numbered)


def make_item(record: Record) -> Item:
    """Return a record as an item: a choice, a response or a text.

    Raises:
        CalibrationError: the choices, the answer or the prompt are invalid.
    """
    fields, where = record.fields, record.where
    if fields.get("choices") is not None:
        return _choice(record)
    answer = answer_of(fields)
    if answer is not None:
        return Item((record,), replace(record, fields=_without(fields, answer)), fields[answer])
    if record.field != "messages" or fields["messages"][-1]["role"] != "assistant":
        return Item((record,))
    *asked, last = fields["messages"]
    if not asked or asked[-1]["role"] == "assistant":
        raise CalibrationError("no user message before the assistant's last message", where, "a user message")
    return Item((record,), replace(record, fields={**fields, "messages": asked}), _text(last["content"], where))


def _choice(record: Record) -> Item:
    choices, where = record.fields["choices"], record.where
    right = isinstance(choices, list) and all(isinstance(one, str) and one.strip() for one in choices)
    if not right or not 2 <= len(choices) <= len(LETTERS) or len(set(choices)) < len(choices):
        raise CalibrationError("`choices` is not a list of distinct texts", where, f"2 to {len(LETTERS)} texts")
    if record.field != "question":
        raise CalibrationError(f"the record has `choices` with `{record.field}`", where, "`question` with `choices`")
    question = record.fields["question"]
    if not all(choice in question for choice in choices):
        lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        question = "\n".join([question, *lines])
    fields = {**_without(record.fields, "response"), "question": question}
    wholes = tuple(replace(record, fields={**fields, "response": choice}) for choice in choices)
    answer = _place(record.fields.get("answer"), choices, where)
    return Item(wholes, replace(record, fields=fields), choices[answer], tuple(choices), answer)


def _place(answer: Any, choices: Sequence[str], where: str) -> int:
    """Return the index of the right choice, given as index from 0, text or letter."""
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        texts = [choice.strip() for choice in choices]
        for names in (texts, list(LETTERS[: len(choices)])):
            if answer.strip() in names:
                return names.index(answer.strip())
    raise CalibrationError(
        f"`answer` is {shown(repr(answer))}", where, f"0 to {len(choices) - 1}, or the letter or text of a choice"
    )


def _text(content: Any, where: str) -> str:
    """Return the text of a message, which may consist of parts."""
    parts = [content] if isinstance(content, str) else content
    if isinstance(parts, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if all(isinstance(part, str) for part in parts) and "".join(parts).strip():
            return "".join(parts)
    raise CalibrationError("the assistant's last message has no text", where)


def names_of(files: Sequence[str]) -> list[str]:
    """Return the distinct names of data files: their stems, preceded by the folder where stems are equal."""
    paths = [Path(file) for file in files]
    stems = Counter(path.stem for path in paths)
    return unique([path.stem if stems[path.stem] == 1 else f"{path.parent.name}/{path.stem}" for path in paths])


def _without(fields: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _located(file: str) -> Path:
    path = fetch(file, (), CalibrationError) if is_uri(file) else locate(file, Path.cwd(), CalibrationError)
    if not os.path.isfile(path):  # noqa: PTH113 - false, not an error, for a name that no file can have
        raise CalibrationError("no such data file", str(path))
    return path
