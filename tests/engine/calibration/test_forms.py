"""Records as other tools write them: their forms, tools, system messages, and the texts of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
import tiny_images
import torch
from errors import refused

from engine.calibration.forms import checked, field_of
from engine.calibration.image_encoder import ImageEncoder
from engine.calibration.records import Record, read_file
from engine.calibration.samples import Encoded
from engine.calibration.text_encoder import TextEncoder
from engine.errors import CalibrationError
from engine.models.loading import load_processor, load_tokenizer

CALL = {"type": "function", "function": {"name": "w7", "arguments": {"city": "w8"}}}
TOOL = {"type": "function", "function": {"name": "w7", "parameters": {}}}
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} "
    "{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }} {{ c['function']['arguments']['city'] }} {% endfor %}"
    "</s> {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('unsystematic') }}{% endif %}" + WITH_TOOLS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    """Return a tokenizer whose chat template has tools; a test may change it."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = WITH_TOOLS
    return tokenizer


def encoded(record: dict[str, Any], tokenizer: Any) -> Encoded:
    return TextEncoder(tokenizer).encode(Record("file:1", checked(record, "file:1"), 1.0))


def words(record: dict[str, Any], tokenizer: Any) -> str:
    text: str = tokenizer.decode(encoded(record, tokenizer).input_ids)
    return text


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("record", "same"),
    [
        ({"prompt": chat("w1"), "completion": chat("w1", "w2")[1:]}, {"messages": chat("w1", "w2")}),
        ({"prompt": chat("w1"), "completion": "w2"}, {"messages": chat("w1", "w2")}),
        ({"prompt": chat("w1")}, {"messages": chat("w1")}),
        ({"conversations": turns("w1", "w2", "w3")}, {"messages": chat("w1", "w2", "w3")}),
        ({"conversations": turns("w1"), "system": "w4"}, {"messages": chat("w1", system="w4")}),
        ({"conversations": [{"from": "system", "value": "w4"}, *turns("w1")]}, {"messages": chat("w1", system="w4")}),
        ({"conversations": chat("w1", "w2")}, {"messages": chat("w1", "w2")}),
        ({"instruction": "w1", "input": "", "output": "w2"}, {"question": "w1", "response": "w2"}),
        ({"instruction": "w1", "input": "w2", "output": "w3"}, {"question": "w1\nw2", "response": "w3"}),
        ({"instruction": "w1"}, {"question": "w1"}),
        (
            {"instruction": "w3", "output": "w4", "system": "w5", "history": [["w1", "w2"]]},
            {"messages": chat("w1", "w2", "w3", "w4", system="w5")},
        ),
        (
            {"messages": [*chat("w1"), {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}]},
            {"messages": [*chat("w1"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        ),
        (
            {"conversations": [*turns("w1"), {"from": "function_call", "value": json.dumps(CALL["function"])}]},
            {"messages": [*chat("w1"), {"role": "assistant", "tool_calls": [CALL]}]},
        ),
        (
            {
                "conversations": [*turns("w1"), {"from": "observation", "value": "w3"}],
                "tools": json.dumps([TOOL]),
            },
            {"messages": [*chat("w1"), {"role": "tool", "content": "w3"}], "tools": [TOOL]},
        ),
        (
            {"conversations": turns("w1"), "tools": json.dumps([TOOL["function"]])},
            {"messages": chat("w1"), "tools": [TOOL]},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": " w2"}]}
                ]
            },
            {"messages": chat("w1 w2")},
        ),
    ],
    ids=str,
)
def test_another_form_is_the_same_sample(record: dict[str, Any], same: dict[str, Any], tokenizer: Any) -> None:
    one, other = encoded(record, tokenizer), encoded(same, tokenizer)
    assert one == other and len(one.input_ids) > 2


def test_a_field_of_today_comes_before_the_other_forms() -> None:
    others = {"prompt": "w1", "conversations": turns("w1"), "instruction": "w1"}
    for field, value in {"text": "w2", "question": "w2", "messages": chat("w2"), "input_ids": [7]}.items():
        assert field_of(checked(others | {field: value}, "")) == field


def test_a_prompt_is_continued_as_it_is(tokenizer: Any) -> None:
    """A prompt with a completion is plain text, without chat template, as in TRL."""
    assert words({"prompt": "w1 w2", "completion": " w3"}, tokenizer) == "w1 w2 w3"
    answered, asked = (
        encoded(record, tokenizer) for record in ({"prompt": "w1 w2", "completion": " w3"}, {"prompt": "w1 w2"})
    )
    assert (answered.is_prompt, answered.response) == (False, 2)
    assert (asked.is_prompt, asked.response, list(asked.input_ids)) == (True, None, list(answered.input_ids)[:2])


@pytest.mark.parametrize("part", [{"type": "audio"}, {"type": "image"}, "w1", {"type": "text", "text": None}], ids=str)
def test_a_part_that_is_no_text_is_refused(part: Any, tokenizer: Any) -> None:
    with refused(CalibrationError, where="file:1", facts=["text"]):
        encoded({"messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}, part]}]}, tokenizer)


@pytest.mark.parametrize("record", [{"prompt": "w1"}, {"question": "w1"}])
def test_an_end_token_that_the_tokenizer_appends_does_not_end_a_prompt(record: dict[str, Any], folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    end = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=end)
    assert list(tokenizer("w1").input_ids) == [7, 2]
    assert list(encoded(record, tokenizer).input_ids) == [7]
    answer = {"prompt": "completion", "question": "response"}[next(iter(record))]
    answered = encoded(record | {answer: " w2"}, tokenizer)
    assert (list(answered.input_ids), answered.response) == ([7, 8, 2], 1)
    # An end token that the prompt itself ends with stays.
    assert list(encoded({"prompt": "w1 </s>"}, tokenizer).input_ids)[:2] == [7, 2]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "w7", "arguments": {"city": "w8"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "w7", "arguments": '{"city": "w8"}'}}]},
    ],
)
def test_a_call_of_a_tool_needs_no_content(message: dict[str, Any], tokenizer: Any) -> None:
    result = {"role": "tool", "name": "w7", "content": "w9"}
    record = {"messages": [*chat("w1"), message, result, {"role": "assistant", "content": "w3"}], "tools": [TOOL]}
    expected = "w7 user: w1 </s> assistant: w7 w8 </s> <unk> w9 </s> assistant: w3 </s>"
    assert words(record, tokenizer) == expected


@pytest.mark.parametrize(
    "tools",
    [
        {"messages": [*chat("w1"), {"role": "assistant", "tool_calls": [CALL]}]},
        {"messages": chat("w1"), "tools": [TOOL]},
    ],
)
def test_a_chat_template_that_drops_tools_is_refused(tools: dict[str, Any], folder: Path) -> None:
    with refused(CalibrationError, "file:1", do="`tokenizer_source`", facts=["'w7'"]):
        encoded(tools, load_tokenizer(folder))


def test_tools_reach_the_chat_template_of_a_processor(tmp_path: Path) -> None:
    merge = tiny_images.make_merge(tmp_path, "qwen2_vl")
    processor = load_processor(merge.parent / "base")
    processor.chat_template = "{% for t in tools %}{{ t['function']['name'] }} {% endfor %}{{ messages[0]['role'] }}"
    record = Record("file:1", checked({"messages": chat("w1"), "tools": [TOOL]}, ""), 1.0)
    text = processor.tokenizer.decode(ImageEncoder(processor, torch.float32).encode(record).input_ids)
    assert text.split()[0] == "w7"


def test_a_system_message_that_the_template_refuses_is_named_with_the_way_out(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM
    with refused(CalibrationError, "file:1", do="system message", facts=["unsystematic"]):
        encoded({"messages": chat("w1", "w2", system="w4")}, tokenizer)
    assert "w4 w1" in words({"messages": chat("w4 w1", "w2")}, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with refused(CalibrationError, "file:1", facts=["never"]) as caught:
        encoded({"messages": chat("w1", system="w4")}, tokenizer)
    assert caught.value.do == ""


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_windows_line_ends_are_no_part_of_records(tmp_path: Path, mark: bytes, ends: str) -> None:
    records = [{"text": "w1"}, {"text": "w2"}]
    lines = ends.join(json.dumps(record) for record in records) + ends
    (tmp_path / "a.jsonl").write_bytes(mark + lines.encode())
    (tmp_path / "a.json").write_bytes(mark + json.dumps(records, indent=1).replace("\n", ends).encode())
    for name in ("a.jsonl", "a.json"):
        assert [record.fields for record in read_file(tmp_path / name)] == records


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": "ü"}, ensure_ascii=False).encode(encoding))
    with refused(CalibrationError, "a.jsonl", do="UTF-8"):
        read_file(tmp_path / "a.jsonl")


def test_keys_that_parquet_fills_up_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    messages = [*chat("w1"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "w9"}]
    other = {"type": "function", "function": {"name": "w6", "arguments": {"day": "w5"}}}
    rows = [{"messages": messages}, {"messages": [*chat("w1"), {"role": "assistant", "tool_calls": [other]}]}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [record.fields["messages"] for record in read_file(tmp_path / "a.parquet")]
    assert read == [checked(row, "")["messages"] for row in rows]


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        ({"conversations": []}, ["`conversations`"]),
        ({"conversations": ["w1"]}, ["`conversations`"]),
        ({"conversations": [{"from": "narrator", "value": "w1"}]}, ["'narrator'", "human"]),
        ({"conversations": [{"from": ["human"], "value": "w1"}]}, ["'human'"]),
        ({"conversations": [{"from": "human", "value": None}]}, ["None"]),
        ({"conversations": [{"from": "function_call", "value": "w7(w8)"}]}, ["JSON"]),
        ({"conversations": turns("w1"), "system": 5}, ["`system`"]),
        ({"conversations": turns("w1"), "tools": "[{"}, ["JSON"]),
        ({"instruction": ""}, ["`instruction`"]),
        ({"instruction": "w1", "input": ["w2"]}, ["`input`"]),
        ({"instruction": "w1", "output": 3}, ["`output`"]),
        ({"instruction": "w1", "history": [["w1"]]}, ["`history`"]),
        ({"instruction": "w1", "history": 5}, ["`history`"]),
        ({"instruction": "w1", "history": [["w1", 2]]}, ["`history`"]),
        ({"prompt": ""}, ["`prompt`"]),
        ({"prompt": "w1", "completion": ["w2"]}, ["`completion`"]),
        ({"prompt": chat("w1"), "completion": 5}, ["`completion`"]),
        ({"messages": [{"role": "user", "content": None}]}, ["`messages`"]),
        ({"messages": [{"role": "assistant", "tool_calls": ["w7"]}]}, ["`tool_calls`"]),
        ({"messages": [{"role": "assistant", "tool_calls": {"name": "w7"}}]}, ["`tool_calls`"]),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 7}}]}]}, ["`tool_calls`"]),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "w7", "arguments": "w8"}]}]}, ["JSON", "w7"]),
        ({"messages": chat("w1"), "tools": {"name": "w7"}}, ["`tools`"]),
        ({"messages": chat("w1"), "tools": [{"parameters": {}}]}, ["`tools`"]),
    ],
    ids=str,
)
def test_an_invalid_record_of_another_form_is_refused(record: dict[str, Any], facts: list[str]) -> None:
    with refused(CalibrationError, "file:1", facts=facts):
        checked(record, "file:1")
