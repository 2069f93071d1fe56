"""The forms of a record: those that encoders read (FIELDS), and those of other tools, which are turned into them.

- `prompt` and `completion`: two texts, or two lists of messages (TRL)
- `conversations`: a list of {from, value}, with `system` and `tools` (ShareGPT)
- `instruction`, `input` and `output`, with `system` and `history` (Alpaca)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import CalibrationError
from engine.untrusted import SHOWN, parse_json, shown

# In order of precedence: the first field that a record has is used.
FIELDS = ("input_ids", "messages", "question", "text", "prompt")
OTHERS = ("conversations", "instruction")

# Fields that are read with these; `choices` and `answer` are for evaluations.
READ = {
    *FIELDS, *OTHERS, "answer", "choices", "completion", "history", "image_path", "image_paths", "input", "output",
    "response", "system", "tools",
}  # fmt: skip

# Speakers of ShareGPT and the roles of messages.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "function_call": "assistant", "system": "system", "observation": "tool", "tool": "tool",
    "function_response": "tool",
}  # fmt: skip


def field_of(record: Mapping[str, Any]) -> str | None:
    """Return the field of FIELDS that is used, None if there is none."""
    return next((field for field in FIELDS if record.get(field) is not None), None)


def checked(given: Any, where: str) -> dict[str, Any]:
    """Return a record in a form that encoders read, with its other fields.

    Raises:
        CalibrationError: the record has no usable field, or one of a wrong type.
    """
    if not isinstance(given, dict):
        raise CalibrationError("the record is not a mapping of fields to values", where)
    record: dict[str, Any] = given
    if field_of(record) is None:
        record = record | _of_others(record, where)
    elif field_of(record) == "prompt" and isinstance(record["prompt"], list):
        record = record | {"messages": record["prompt"] + _completion(record.get("completion"), where)}
    field = field_of(record)
    assert field is not None
    value = record[field]
    if field == "messages":
        return record | _chat(value, record.get("tools"), where)
    if field == "input_ids":
        if not (isinstance(value, list) and all(type(token) is int for token in value)):
            raise CalibrationError("`input_ids` is not a list of integers", where)
        return record
    _text(record, field, where)
    answer = {"question": "response", "prompt": "completion"}.get(field)
    if answer and not (record.get(answer) is None or isinstance(record[answer], str)):
        raise CalibrationError(f"`{answer}` is not a string", where)
    return record


def no_field(fields: Sequence[str], where: str) -> CalibrationError:
    """Return the error for a record without a usable field."""
    has = shown(", ".join(fields), 4 * SHOWN)
    return CalibrationError(
        f"the record has no usable field; its fields: {has or 'none'}", where, f"one of {', '.join(FIELDS + OTHERS)}"
    )


def answer_of(record: Mapping[str, Any]) -> str | None:
    """Return the name of the field with the answer to the record's question or prompt, None if it has no answer."""
    name = {"question": "response", "prompt": "completion"}.get(field_of(record) or "")
    return name if name and record.get(name) else None


def without_none(value: Any) -> Any:
    """Return a value without the keys whose value is None, which parquet adds to mappings of unequal keys."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def called(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the names of the functions that messages call."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            yield call.get("function", call)["name"]


def described(tools: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    """Yield the names of the functions that a record's tools describe."""
    for tool in tools or ():
        yield tool.get("function", tool)["name"]


def _of_others(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of FIELDS for a record in one of the other forms."""
    if record.get("conversations") is not None:
        turns = record["conversations"]
        if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
            raise CalibrationError("`conversations` is not a list of {from, value}", where)
        return {"messages": _system(record, where) + [_turn(turn, where) for turn in turns]}
    if record.get("instruction") is None:
        raise no_field(list(map(str, record)), where)
    parts = [_text(record, name, where) for name in ("instruction", "input") if record.get(name) or name != "input"]
    answer = [_message("assistant", _text(record, "output", where))] if record.get("output") else []
    earlier = record.get("history") or []
    if not (isinstance(earlier, list) and all(map(_is_pair, earlier))):
        raise CalibrationError("`history` is not a list of pairs", where, "[question, answer] for each earlier turn")
    turns = [_message(role, text) for pair in earlier for role, text in zip(("user", "assistant"), pair, strict=True)]
    if not (turns or record.get("system")):
        return {"question": "\n".join(parts), "response": record.get("output") or None}
    return {"messages": [*_system(record, where), *turns, _message("user", "\n".join(parts)), *answer]}


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a turn of ShareGPT as a message."""
    if "from" not in turn:
        return turn  # a message in a field of that name
    speaker, value = turn["from"], turn.get("value")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(value, str):
        raise CalibrationError(
            f"a turn of `conversations` is {shown(repr(turn))}",
            where,
            f"a text `value`, `from` one of {', '.join(ROLES)}",
        )
    if speaker != "function_call":
        return _message(role, value)
    calls = parse_json(value, where, CalibrationError)
    return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _chat(messages: Any, tools: Any, where: str) -> dict[str, Any]:
    """Return messages and tools as chat templates take them, after checking them."""
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise CalibrationError("`messages` is not a list of {role, content}", where)
    if isinstance(tools, str):
        tools = parse_json(tools, where, CalibrationError) if tools.strip() else None
    if tools and not (isinstance(tools, list) and all(map(_is_call, tools))):
        raise CalibrationError("`tools` is not a list of functions", where, "{function: {name, …}} for each")
    described = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]
    return {"messages": [_plain(message, where) for message in messages], "tools": described or None}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (message.get("content") is not None or bool(message.get("tool_calls")))
    )


def _plain(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message without empty keys, with a text as content and the arguments of its calls as mappings."""
    calls = message.get("tool_calls") or []
    if not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise CalibrationError("`tool_calls` is not a list of calls", where, "{function: {name, arguments}} for each")
    kept = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    return {"content": ""} | kept | ({"tool_calls": [_call(call, where) for call in calls]} if calls else {})


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a call of a tool with its arguments as a mapping, which may be given as JSON text."""
    function = dict(call.get("function", call))
    given = function.get("arguments")
    if isinstance(given, str):
        place = f"{where}: arguments of {shown(function['name'])}"
        function["arguments"] = parse_json(given, place, CalibrationError) if given.strip() else {}
    return call | {"function": function} if "function" in call else {"type": "function", "function": function}


def _is_call(call: Any) -> bool:
    """Return whether a value names a function, as a call of a tool and a description of one do."""
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _completion(completion: Any, where: str) -> list[Any]:
    """Return the completion of a list of messages as messages."""
    if completion is None or isinstance(completion, list):
        return completion or []
    if not isinstance(completion, str):
        raise CalibrationError("`completion` is neither a text nor a list of messages", where)
    return [_message("assistant", completion)] if completion else []


def _system(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    return [_message("system", _text(record, "system", where))] if record.get("system") else []


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not (isinstance(value, str) and value.strip()):
        raise CalibrationError(f"`{field}` is not a string, or it is empty", where)
    return value
