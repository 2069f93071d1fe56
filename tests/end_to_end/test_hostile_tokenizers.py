"""Hostile tokenizers and chat templates, through the command line and with small limits; more in `test_hostile`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from errors import refused as refused_with
from hostile import Server, refused
from hostile_inputs import (
    Cases,
    Spoil,
    calibration,
    cases,
    edit_json,
    link,
    make_folder,
    move_out,
    pipe,
    put,
    template,
    text_record,
    tokenizer,
    tokenizer_config,
    weight_space,
)

import engine.bounded_process
from engine.calibration.bounded_encoder import BoundedEncoder
from engine.calibration.records import Record
from engine.calibration.text_encoder import TextEncoder
from engine.errors import CalibrationError, CheckpointError, InputError
from engine.models.loading import check_tokenizer, load_tokenizer

TOKENIZER = ["in/base: ", "tokenizer"]
RECORD, TEMPLATE = ["x.jsonl:1", "tokenizer"], ["x.jsonl:1", "chat template"]
# The size of a table, 4 GiB of it, in four bytes.
GIGANTIC = {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}


def token(number: Any, content: Any = "<x>") -> dict[str, Any]:
    """Return an added token of a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True} | flags


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(part: dict[str, Any], count: int) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [part] * count}


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        part = sequence(part, 1)
    return part


def words(**ids: Any) -> dict[str, Any]:
    return {"type": "WordLevel", "vocab": {"<unk>": 3} | ids, "unk_token": "<unk>"}


def long_record(folder: Path, text: str) -> None:
    calibration(folder, f'{{"text": "{text}"}}\n')


def file(name: str, spoil: Callable[[Path, str], Any]) -> Spoil:
    """Return a function that corrupts a file of the base, whose tokenizer a record needs."""
    return lambda folder: (text_record(folder), spoil(folder, f"base/{name}"))


# Most of the facts are those of the libraries that the message quotes.
TOKENIZERS: Cases = {
    "table of 4 GiB": (lambda f: tokenizer(f, normalizer=GIGANTIC), [*TOKENIZER, "4 GiB", "60 CPU seconds"]),
    "normalizers in each other": (lambda f: tokenizer(f, normalizer=nested(100)), [*TOKENIZER, "recursion"]),
    "100,000 lists": (file("tokenizer.json", lambda f, name: put(f, name, "[" * 100_000)), [*TOKENIZER, "recursion"]),
    "not UTF-8": (file("tokenizer.json", lambda f, name: put(f, name, b'{"a": "\xff"}')), [*TOKENIZER, "0xff"]),
    "empty": (file("tokenizer.json", lambda f, name: put(f, name, b"")), [*TOKENIZER, "Expecting value"]),
    "number": (file("tokenizer.json", lambda f, name: put(f, name, "1")), [*TOKENIZER, "'int'"]),
    "folder": (file("tokenizer.json", make_folder), ["base/tokenizer.json", "a directory"]),
    "link out": (file("tokenizer.json", move_out), ["base/tokenizer.json", "link", "in/outside"]),
    "endless device": (
        file("tokenizer_config.json", lambda f, name: link(f, name, "/dev/zero")),
        ["base/tokenizer_config.json", "link", "/dev/zero"],
    ),
    "pipe that a class opens": (
        lambda f: (tokenizer_config(f, tokenizer_class="MarianTokenizer"), pipe(f, "base/source.spm")),
        ["base/source.spm", "pipe"],
    ),
    "config that is a pipe": (file("special_tokens_map.json", pipe), ["base/special_tokens_map.json", "pipe"]),
    "template that is a pipe": (
        lambda f: (put(f, "base/chat_template.jinja", ""), template(f, ""), pipe(f, "base/chat_template.jinja")),
        ["base/chat_template.jinja", "pipe"],
    ),
    "merge of unknown tokens": (
        lambda f: tokenizer(f, model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "zz"]]}),
        [*TOKENIZER, "`zz`"],
    ),
    "unknown token beyond the end": (
        lambda f: tokenizer(f, model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 10**9}),
        [*TOKENIZER, "UnkIdNotInVocabulary"],
    ),
    "id below 0": (lambda f: tokenizer(f, model=words(w1=-1)), [*TOKENIZER, "`-1`"]),
    "id of 2⁴⁰": (lambda f: tokenizer(f, model=words(w1=2**40)), [*TOKENIZER, f"`{2**40}`"]),
    "id of 2³² - 1": (lambda f: tokenizer(f, model=words(w1=2**32 - 1)), ["x.jsonl:1", f"{2**32 - 1}", "64"]),
    "added token below 0": (lambda f: tokenizer(f, added_tokens=[token(-5)]), [*TOKENIZER, "`-5`"]),
    "added token of 31 digits": (lambda f: tokenizer(f, added_tokens=[token(10**30)]), [*TOKENIZER, "1e+30"]),
    "added token that is a list": (lambda f: tokenizer(f, added_tokens=[token(5, ["x"])]), [*TOKENIZER, "'list'"]),
    "added token that is used": (
        lambda f: (tokenizer(f, added_tokens=[token(2**32 - 1)]), long_record(f, "<x>")),
        ["x.jsonl:1", "from 64"],
    ),
    "100,000 ids per text": (
        lambda f: tokenizer(
            f,
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "Z", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"Z": {"id": "Z", "ids": [99] * 10**5, "tokens": ["Z"] * 10**5}},
            },
        ),
        ["x.jsonl:1", "from 99"],
    ),
    "length that is text": (lambda f: tokenizer_config(f, model_max_length="x"), [*RECORD, "'str'"]),
    "end token that is a list": (lambda f: tokenizer_config(f, eos_token=["a"]), [*TOKENIZER, "eos_token"]),
    "first token of lists": (
        lambda f: tokenizer_config(f, bos_token={"__type": "AddedToken", "content": ["x"]}),
        [*TOKENIZER, "'list'"],
    ),
    **{
        f"template with {text:.40}": (
            (lambda t: lambda f: template(f, "{{ " + t + " }}"))(text),
            [*TEMPLATE, "unsafe" if "append" not in text else "append"],
        )
        for text in (
            "raise_exception.__globals__.os",
            "cycler.__init__.__globals__.os.system('touch ../ran')",
            "'{0.__class__.__mro__}'.format(1)",
            "(messages | map(attribute='__class__') | first).mro()",
            "messages.append(1)",
        )
    },
    "template that doubles": (
        lambda f: template(
            f, "{% set x = namespace(a='aa') %}" + "{% for i in range(99) %}{% set x.a = x.a * 2 %}{% endfor %}"
        ),
        [*TEMPLATE, "memory"],
    ),
}
QUICK = {
    "added token below 0",
    "empty",
    "id below 0",
    "length that is text",
    "link out",
    "merge of unknown tokens",
    "normalizers in each other",
    "pipe that a class opens",
    "table of 4 GiB",
    "template that doubles",
}

SCORED = '{"question": "w1", "response": "w2"}\n'
EVALUATED: Cases = {
    "table of 4 GiB": (lambda f: edit_json(f, "base/tokenizer.json", normalizer=GIGANTIC), [*TOKENIZER, "4 GiB"]),
    "template with a way out": (
        lambda f: put(f, "base/chat_template.jinja", "{{ ''.__class__.__mro__ }}"),
        ["a.jsonl:1", "chat template", "unsafe"],
    ),
    "pipe": (lambda f: pipe(f, "base/source.spm"), ["base/source.spm", "pipe"]),
}

PLANNED: Cases = {
    "table of 4 GiB": (lambda f: edit_json(f, "expert0/tokenizer.json", normalizer=GIGANTIC), ["4 GiB"]),
    "ids of 2⁴⁰": (lambda f: edit_json(f, "expert0/tokenizer.json", model=words(w1=2**40)), [f"`{2**40}`"]),
}


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a merge, for the test to corrupt."""
    return shutil.copytree(llama_merge.parent, tmp_path / "in")


@cases(thorough=TOKENIZERS.keys() - QUICK, tokenizer=TOKENIZERS)
def test_a_hostile_tokenizer_is_refused_before_anything_starts(
    merger: Server, folder: Path, spoil: Spoil, facts: list[str]
) -> None:
    spoil(folder)
    refused(merger.run("merge", "merge.yaml", "--out", "../out", cwd=folder), facts, prepared=True)


@cases(evaluated=EVALUATED)
def test_a_hostile_tokenizer_is_not_evaluated(merger: Server, folder: Path, spoil: Spoil, facts: list[str]) -> None:
    put(folder, "a.jsonl", SCORED)
    spoil(folder)
    refused(merger.run("evaluate", "base", "--data", "a.jsonl", cwd=folder), facts, prepared=True)


@cases(planned=PLANNED)
def test_a_hostile_tokenizer_is_refused_by_a_plan(
    planner: Server, folder: Path, spoil: Spoil, facts: list[str]
) -> None:
    shutil.copy(folder / "base" / "tokenizer.json", folder / "expert0")
    weight_space(folder, tokenizer_source="expert0")
    spoil(folder)
    refused(planner.run("plan", "merge.yaml", cwd=folder), ["expert0/tokenizer.json", *facts])


def encode(folder: Path, text: str) -> Any:
    with BoundedEncoder(lambda: TextEncoder(load_tokenizer(folder)), folder) as encoder:
        return encoder.encode(Record("a:1", {"text": text}, 1.0))


def decode(folder: Path) -> Any:
    tokens = lambda: load_tokenizer(folder)  # noqa: E731
    with BoundedEncoder(lambda: TextEncoder(None), folder, tokens) as encoder:
        return encoder.decode([[7]])


def edited(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder, "tokenizer.json", **changes)


GROWTH = replace({"String": "w"}, "ww")
SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
LIMITED: dict[str, tuple[Spoil, Callable[[Path], Any], type[InputError], str, str]] = {
    "text that doubles": (
        edited(normalizer=sequence(GROWTH, 60)),
        lambda f: encode(f, "w1"),
        CalibrationError,
        "a:1",
        "CPU seconds",
    ),
    "text of 10 GB": (
        edited(normalizer=sequence(replace({"String": "w"}, "w" * 99_999), 9)),
        lambda f: encode(f, "w1"),
        CalibrationError,
        "a:1",
        "GiB of memory",
    ),
    "answer that doubles": (
        edited(decoder={"type": "Sequence", "decoders": [GROWTH] * 60}),
        decode,
        CheckpointError,
        "model",
        "CPU seconds",
    ),
    "expressions that end late": (
        edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [SLOW] * 99}),
        lambda f: encode(f, "a" * 20 + "!"),
        CalibrationError,
        "a:1",
        "CPU seconds",
    ),
    "expression that is none": (
        edited(normalizer=replace({"Regex": "("}, "")),
        check_tokenizer,
        CheckpointError,
        "model",
        "unmatched parenthesis",
    ),
    "400,000 merges": (
        edited(model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]] * 400_000}),
        check_tokenizer,
        CheckpointError,
        "model",
        "CPU seconds",
    ),
    "50,000 special tokens": (
        edited(added_tokens=[token(64 + number, f"<{number}>") for number in range(50_000)]),
        check_tokenizer,
        CheckpointError,
        "model",
        "CPU seconds",
    ),
}


@pytest.mark.parametrize(("spoil", "use", "kind", "where", "fact"), LIMITED.values(), ids=list(LIMITED))
def test_a_tokenizer_is_stopped_at_its_limits(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spoil: Spoil,
    use: Callable[[Path], Any],
    kind: type[InputError],
    where: str,
    fact: str,
) -> None:
    tiny.save_tokenizer(tmp_path / "model")
    spoil(tmp_path / "model")
    monkeypatch.setattr(engine.bounded_process, "SECONDS", 0.3)
    monkeypatch.setattr(engine.bounded_process, "MEMORY", 512 << 20)
    with refused_with(kind, where=where, facts=[fact]):
        use(tmp_path / "model")
