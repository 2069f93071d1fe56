"""What a model is evaluated on: the records of data files, and what each is asked for.

A record with a response is asked to be answered, one with choices to be chosen from; any other is a text. Knows no
models and no tokens, and needs no torch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.calibration.records import Record, read_file, text_of
from engine.errors import CalibrationError
from engine.evaluation.metrics import LETTERS
from engine.storage.cache import fetch
from engine.storage.paths import is_uri, locate
from engine.untrusted import shown

Kind = Literal["text", "response", "choice"]


@dataclass(frozen=True)
class Item:
    """One record. `wholes` are all that the model is shown at once: the record, or it with each of its choices.

    `prompt` is the record up to its answer (None: a text has none), `response` what it should be; of a choice,
    `choices` are those that there are, `answer` is the place of the right one.
    """

    wholes: tuple[Record, ...]
    prompt: Record | None = None
    response: str = ""
    choices: tuple[str, ...] = ()
    answer: int = 0

    @property
    def kind(self) -> Kind:
        """What it is asked for."""
        return "text" if self.prompt is None else "choice" if self.choices else "response"

    @property
    def length(self) -> int:
        """About how long it is, to put those of a length together."""
        return max(len(text_of(record.fields)) for record in self.wholes)


@dataclass(frozen=True)
class DataSet:
    """The items of one file, all of one kind. `name` is the file's stem, with its folder where two are alike; `expert`
    whom texts are compared with, as any node can find it.
    """

    name: str
    items: tuple[Item, ...]
    expert: str | None = None

    @property
    def kind(self) -> Kind:
        """What they are asked for."""
        return self.items[0].kind


def read_data(files: Sequence[str], limit: int | None = None) -> list[DataSet]:
    """The items of each file, or of its first `limit` records. A file is a path or a URI.

    Raises:
        CalibrationError: a file that cannot be read or is empty, or a record that cannot be asked; naming it.
    """
    found = []
    for name, file in zip(_names(files), files, strict=True):
        items = tuple(map(make_item, read_file(_located(file), limit)))
        other = next((item for item in items if item.kind != items[0].kind), None)
        if other is not None:
            raise CalibrationError(
                f"the record is a {other.kind}, and the first of its file a {items[0].kind}",
                other.wholes[0].where,
                "records of one kind in a file",
                "give each kind in a file of its own",
            )
        found.append(DataSet(name, items))
    return found


def unique(names: Sequence[str]) -> list[str]:
    """The names, those that come again with a number behind them."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found if len(set(found)) == len(found) else unique(found)


def make_item(record: Record) -> Item:
    """What a record is asked for.

    Raises:
        CalibrationError: its choices, its answer or what is before its answer is not what it must be.
    """
    fields, where = record.fields, record.where
    if fields.get("choices") is not None:
        return _choice(record)
    if record.field == "question" and fields.get("response"):
        prompt = replace(record, fields=_without(fields, "response"))
        return Item((record,), prompt, fields["response"])
    if record.field != "messages" or fields["messages"][-1]["role"] != "assistant":
        return Item((record,))
    *asked, last = fields["messages"]
    if not asked or asked[-1]["role"] == "assistant":
        raise CalibrationError("nobody asks before the assistant's last message", where, "a message of the user's")
    return Item((record,), replace(record, fields={**fields, "messages": asked}), _text(last["content"], where))


def _choice(record: Record) -> Item:
    choices, where = record.fields["choices"], record.where
    right = isinstance(choices, list) and all(isinstance(one, str) and one.strip() for one in choices)
    if not right or not 2 <= len(choices) <= len(LETTERS) or len(set(choices)) < len(choices):
        raise CalibrationError("`choices` is no list of differing texts", where, f"2 to {len(LETTERS)} of them")
    if record.field != "question":
        raise CalibrationError(f"the record has choices beside `{record.field}`", where, "`question`")
    question = record.fields["question"]
    if not all(choice in question for choice in choices):
        lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        question = "\n".join([question, *lines])
    fields = {**_without(record.fields, "response"), "question": question}
    wholes = tuple(replace(record, fields={**fields, "response": choice}) for choice in choices)
    answer = _place(record.fields.get("answer"), choices, where)
    return Item(wholes, replace(record, fields=fields), choices[answer], tuple(choices), answer)


def _place(answer: Any, choices: Sequence[str], where: str) -> int:
    """Which choice is right: by its place from 0, its text, or its letter."""
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        texts = [choice.strip() for choice in choices]
        for names in (texts, list(LETTERS[: len(choices)])):
            if answer.strip() in names:
                return names.index(answer.strip())
    raise CalibrationError(
        f"`answer` is {shown(repr(answer))}", where, f"0 to {len(choices) - 1}, a letter, or the text of a choice"
    )


def _text(content: Any, where: str) -> str:
    """The text of a message, which may be in parts."""
    parts = [content] if isinstance(content, str) else content
    if isinstance(parts, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if all(isinstance(part, str) for part in parts) and "".join(parts).strip():
            return "".join(parts)
    raise CalibrationError("the assistant's last message is no text, or an empty one", where)


def _names(files: Sequence[str]) -> list[str]:
    """The files' stems, those that are not the only ones of their kind with the folder before."""
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
