"""Encode text records as token ids with a tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any

import jinja2
from huggingface_hub.errors import StrictDataclassError

from engine.calibration.records import RECORD_BYTES, Record
from engine.calibration.samples import Encoded
from engine.errors import CalibrationError
from engine.untrusted import cpu_limit, library_errors_as, memory_limit

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
        component = "tokenizer" if record.field == "text" or not self._tokenizer.chat_template else "chat template"
        with taking(component, record):
            return self._encode(record)

    def _encode(self, record: Record) -> Encoded:
        tokenizer, question = self._tokenizer, record.fields.get("question")
        if record.field == "text":
            return Encoded(list(tokenizer(record.fields["text"]).input_ids))
        if not tokenizer.chat_template:
            if record.field == "messages":
                raise CalibrationError("the record is a chat, but the tokenizer has no chat template", record.where)
            answer = record.fields.get("response")
            prompt_ids = list(tokenizer(question).input_ids)
            ids = list(tokenizer(f"{question}\n{answer}").input_ids) if answer else prompt_ids
            return Encoded(ids, not answer, in_common(prompt_ids, ids) if answer else None)
        whole, prompt = rendered(messages_of(record), tokenizer.apply_chat_template, record.where)
        ids = list(tokenizer(whole, add_special_tokens=False).input_ids)
        if prompt is None:
            return Encoded(ids, True)
        return Encoded(ids, False, in_common(tokenizer(prompt, add_special_tokens=False).input_ids, ids))


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


def rendered(messages: Messages, template: Callable[..., str], where: str) -> tuple[str, str | None]:
    """Render a chat with a chat template.

    Returns:
        The whole text, and the text before the assistant's last message (None: the chat does not end with one).

    Raises:
        CalibrationError: The template takes too long or too much memory, or its text is too long.
    """
    is_prompt = messages[-1]["role"] != "assistant"
    endless = CalibrationError("the chat template takes too long or too much memory", where)
    with cpu_limit(endless), memory_limit(endless):
        text = template(messages, add_generation_prompt=is_prompt, tokenize=False)
        before = messages[:-1]
        prompt = None if is_prompt else template(before, add_generation_prompt=True, tokenize=False) if before else ""
    if len(text) > RECORD_BYTES:
        length = f"{len(text):,} characters"
        raise CalibrationError(f"the chat template produces {length}", where, f"at most {RECORD_BYTES:,}")
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
