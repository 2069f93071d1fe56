"""Encode text records as token ids with a tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any

import jinja2
from huggingface_hub.errors import StrictDataclassError

from engine.calibration.forms import called, described
from engine.calibration.records import RECORD_BYTES, Record
from engine.calibration.samples import Encoded
from engine.errors import CalibrationError
from engine.untrusted import cpu_limit, library_errors_as, memory_limit, shown

Messages = Sequence[Mapping[str, Any]]


class TextEncoder:
    """Encoder of text with a tokenizer of transformers.

    Args:
        tokenizer: The tokenizer. None is enough if all records are token ids.
        of_images: Ids of image and video tokens, which records of text must not contain.
    """

    def __init__(self, tokenizer: Any, of_images: Set[int] = frozenset()) -> None:
        self._tokenizer, self._of_images = tokenizer, of_images

    def encode(self, record: Record) -> Encoded:
        """Encode a record. See `Encoder.encode`."""
        encoded = self._checked(record)
        check_no_image(encoded, self._of_images, record)
        return encoded

    def _checked(self, record: Record) -> Encoded:
        if record.field == "input_ids":
            return Encoded(list(record.fields["input_ids"]))
        plain = record.field in ("text", "prompt") or not self._tokenizer.chat_template
        with taking("tokenizer" if plain else "chat template", record):
            return without_template(self._tokenizer, record) if plain else self._of_chat(record)

    def _of_chat(self, record: Record) -> Encoded:
        tokenizer = self._tokenizer
        messages = messages_of(record)
        if not self._of_images:
            messages = [_as_text(message, record.where) for message in messages]
        whole, prompt = rendered(messages, tokenizer.apply_chat_template, record)
        ids = list(tokenizer(whole, add_special_tokens=False).input_ids)
        if prompt is None:
            return Encoded(ids, True)
        return Encoded(ids, False, in_common(tokenizer(prompt, add_special_tokens=False).input_ids, ids))


def without_template(tokenizer: Any, record: Record) -> Encoded:
    """Encode a text, a prompt with its completion, or a question with its response, without a chat template.

    Raises:
        CalibrationError: The record is a chat.
    """
    fields = record.fields
    if record.field == "messages":
        raise CalibrationError(
            "the record is a chat, but the tokenizer has no chat template",
            record.where,
            do="set `tokenizer_source` to a model that has a chat template, or give the chat as `text`",
        )
    if record.field == "text":
        return Encoded(list(tokenizer(fields["text"]).input_ids))
    name, between = ("completion", "") if record.field == "prompt" else ("response", "\n")
    prompt, answer = fields[record.field], fields.get(name)
    prompt_ids = list(tokenizer(prompt).input_ids)
    if prompt_ids[-1:] == [tokenizer.eos_token_id] and not prompt.rstrip().endswith(tokenizer.eos_token):
        # The tokenizer has appended its end token, after which no answer would follow.
        prompt_ids.pop()
    if not answer:
        return Encoded(prompt_ids, True)
    ids = list(tokenizer(f"{prompt}{between}{answer}").input_ids)
    return Encoded(ids, False, in_common(prompt_ids, ids))


def check_no_image(encoded: Encoded, of_images: Set[int], record: Record) -> None:
    """Check that a record without images contains no image tokens.

    Raises:
        CalibrationError: It contains one.
    """
    if not of_images.isdisjoint(encoded.input_ids):
        raise CalibrationError("the record contains an image token, but has no image", record.where)


def messages_of(record: Record) -> Messages:
    """Return the messages of a record, or its question and response as messages."""
    if record.field == "messages":
        messages: Messages = record.fields["messages"]
        return messages
    user, answer = {"role": "user", "content": record.fields["question"]}, record.fields.get("response")
    return [user, {"role": "assistant", "content": answer}] if answer else [user]


def _as_text(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a message with its parts as one text: chat templates of text models would write a list as Python does.

    Raises:
        CalibrationError: A part is not a text.
    """
    if not isinstance(message["content"], list):
        return message
    parts = [part.get("text") if isinstance(part, dict) else None for part in message["content"]]
    if not all(isinstance(part, str) for part in parts):
        raise CalibrationError(
            "a part of a message is not a text, but the model takes nothing else", where, "{type: text, text: …}"
        )
    return {**message, "content": "".join(map(str, parts))}


def rendered(messages: Messages, template: Callable[..., str], record: Record) -> tuple[str, str | None]:
    """Render a chat with a chat template, and with the record's tools.

    Returns:
        The whole text, and the text before the assistant's last message (None: the chat does not end with one).

    Raises:
        CalibrationError: The template takes too long or too much memory, its text is too long or lacks a tool of
            the record, or it refuses a system message.
    """
    is_prompt, where = messages[-1]["role"] != "assistant", record.where
    tools = record.fields.get("tools") if record.field == "messages" else None
    endless = CalibrationError("the chat template takes too long or too much memory", where)

    def render(part: Messages, is_open: bool) -> str:
        options = {"add_generation_prompt": is_open, "tokenize": False} | ({"tools": tools} if tools else {})
        try:
            return template(part, **options)
        except jinja2.TemplateError as error:
            others = [message for message in part if message["role"] != "system"]
            if len(others) in (0, len(part)):
                raise
            template(others, **options)  # Raises as well, unless the system message is what the template refuses.
            raise CalibrationError(
                f"the chat template refuses the system message: {error}",
                where,
                do="put the text of the system message at the start of the first user message",
            ) from error

    with cpu_limit(endless), memory_limit(endless):
        text, before = render(messages, is_prompt), messages[:-1]
        prompt = None if is_prompt else render(before, True) if before else ""
    if len(text) > RECORD_BYTES:
        length = f"{len(text):,} characters"
        raise CalibrationError(f"the chat template produces {length}", where, f"at most {RECORD_BYTES:,}")
    dropped = next((name for name in (*called(messages), *described(tools)) if name not in text), None)
    if dropped is not None:
        raise CalibrationError(
            f"the chat template drops the tool {shown(repr(dropped))}",
            where,
            "a chat template that renders `tools` and `tool_calls`",
            "set `tokenizer_source` to a model that has such a template, or leave out records with tools",
        )
    return text, prompt


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences of token ids."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def taking(component: str, record: Record) -> AbstractContextManager[None]:
    """Return a context in which exceptions of a tokenizer, template or processor become errors about the record."""
    return library_errors_as(
        lambda message: CalibrationError(f"the {component} fails on this record: {message}", record.where),
        jinja2.TemplateError,
        StrictDataclassError,
        MemoryError,
    )
