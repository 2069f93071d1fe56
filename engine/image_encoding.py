"""Records with images into a model's inputs, by its processor of transformers. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from engine.calibration import Encoded, Spans
from engine.encoding import Messages, TextEncoder, in_common, messages_of, rendered, taking
from engine.errors import CalibrationError
from engine.images import read_image
from engine.records import Record
from engine.untrusted import shown

PLACE = "<image>"
# What processors call the marks of tokens that stand for images (1) among those of text (0).
MARKS = ("mm_token_type_ids", "token_type_ids")


class ImageEncoder:
    """Text and images by a processor of transformers; floats are kept in `dtype`."""

    def __init__(self, processor: Any, dtype: torch.dtype) -> None:
        self._processor, self._dtype = processor, dtype
        self._template = processor.chat_template or processor.tokenizer.chat_template
        self._text = TextEncoder(processor.tokenizer)

    def encode(self, record: Record) -> Encoded:
        """See `Encoder`."""
        encoded = self._encode(record)
        if not record.images and self._processor.image_token_id in encoded.input_ids:
            raise CalibrationError("the record has the token of an image, and no image", record.where)
        return encoded

    def _encode(self, record: Record) -> Encoded:
        if not record.images and (record.field in ("input_ids", "text") or not self._template):
            return self._text.encode(record)
        if not self._template:
            raise CalibrationError(
                "the record has images, and there is no chat template to say where they stand",
                record.where,
                do="name a model that has one by `tokenizer_source`",
            )
        images = [read_image(path, record.where) for path in record.images]
        with taking("processor", record):
            text, prompt = rendered(placed(record), self._rendered, record.where)
            self._check_options(record)
            options = dict(record.image_options or {})
            output = self._processor(
                text=[text], images=images or None, return_tensors="pt", images_kwargs=options, add_special_tokens=False
            )
            tokenizer = self._processor.tokenizer
            short, asked = (
                tokenizer(part, add_special_tokens=False).input_ids if part else [] for part in (text, prompt)
            )
        ids_T = output["input_ids"][0]
        marks_BT = next(
            (output[name] for name in MARKS if name in output), ids_T[None] == self._processor.image_token_id
        )
        # All that an image stands for comes before the last answer, so that is as long as in the text.
        answer = None if prompt is None else len(ids_T) - len(short) + in_common(asked, short)
        inputs = {name: value for name, value in output.items() if name not in ("input_ids", "attention_mask")}
        return Encoded(
            ids_T.tolist(),
            prompt is None,
            answer,
            spans(marks_BT[0]),
            {name: kept(value, self._dtype) for name, value in inputs.items()} if images else {},
        )

    def _rendered(self, messages: Messages, **options: Any) -> str:
        text: str = self._processor.apply_chat_template(messages, chat_template=self._template, **options)
        return text

    def _check_options(self, record: Record) -> None:
        known = sorted(self._processor.image_processor.valid_kwargs.__annotations__)
        unknown = [name for name in record.image_options or () if name not in known]
        if unknown:
            who = type(self._processor.image_processor).__name__
            raise CalibrationError(
                f"image_options has {shown(repr(unknown[0]))}, which {who} does not know",
                record.where,
                f"one of {', '.join(known)}",
            )


def placed(record: Record) -> Messages:
    """The record's chat in parts, each image in its place: where a part or an <image> says, else before the text of the
    first message of the user.
    """
    seen = bool(record.images)
    messages = [{**message, "content": _parts(message["content"], seen)} for message in messages_of(record)]
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    first = next((message for message in messages if message["role"] == "user"), None)
    if not places and first is not None:
        first["content"] = [{"type": "image"}] * len(record.images) + first["content"]
        places = len(record.images)
    if places != len(record.images):
        raise CalibrationError(f"the record has {places} places for {len(record.images)} images", record.where)
    return messages


def _parts(content: Any, seen: bool) -> list[Mapping[str, str]]:
    """A message's content as parts: texts and, where images are `seen`, their places."""
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts: list[Mapping[str, str]] = []
    for part in given if isinstance(given, list) else [None]:
        if not isinstance(part, dict) or part.get("type") not in ("image", "text"):
            raise ValueError(f"a message's content is {shown(repr(part))}, and no text or parts of text and image")
        if part["type"] == "image":
            parts.append({"type": "image"})
            continue
        first, *others = str(part.get("text")).split(PLACE) if seen else [str(part.get("text"))]
        parts += [{"type": "text", "text": first}] if first else []
        for text in others:
            # What a template puts behind an image is its own affair.
            text = text.removeprefix("\n")
            parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts


def spans(marks_T: Tensor) -> Spans:
    """Where runs of tokens that are not 0 begin and end."""
    found, place = [], 0
    for marked, run in groupby(marks_T.bool().tolist()):
        length = len(list(run))
        if marked:
            found.append((place, place + length))
        place += length
    return tuple(found)


def kept(value: Any, dtype: torch.dtype) -> Tensor:
    """A processor's output as a tensor of its own, floats in the run's dtype."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return tensor.to(dtype, copy=True).contiguous() if tensor.is_floating_point() else tensor.contiguous()


def texts(content: Sequence[Mapping[str, str]], place: str) -> str:
    """Parts as one text, with a line for each image."""
    return "".join(part["text"] if part["type"] == "text" else f"{place}\n" for part in content)
