"""Records with images into a model's inputs, by its processor of transformers. Runs no model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.calibration.images import read_image
from engine.calibration.records import Record
from engine.calibration.samples import Encoded, Spans
from engine.calibration.text_encoder import (
    Messages,
    TextEncoder,
    check_no_image,
    in_common,
    messages_of,
    rendered,
    taking,
)
from engine.errors import CalibrationError
from engine.untrusted import cpu_limit, memory_limit, shown

PLACE = "<image>"


# What processors call the marks of tokens that stand for images (1) among those of text (0).
MARKS = ("mm_token_type_ids", "token_type_ids")


# Options of which 0 is one to choose; all others are sizes and counts.
ANY_NUMBER = ("resample", "image_mean")


# What a processor knows, too, and is no matter of the image.
OF_TENSORS = {"return_tensors", "data_format", "input_data_format", "device", "disable_grouping"}


# Of a size that all patches divide, and one to be made as large as any is.
TRIALS = (Image.new("RGB", (448, 448)), Image.new("RGB", (1, 1)))


class ImageEncoder:
    """Text and images by a processor of transformers; floats are kept in `dtype`."""

    def __init__(self, processor: Any, dtype: torch.dtype) -> None:
        self._processor, self._dtype = processor, dtype
        self._template = processor.chat_template or processor.tokenizer.chat_template
        self._text = TextEncoder(processor.tokenizer)
        self._seen = {processor.image_token_id, getattr(processor, "video_token_id", None)} - {None}
        self._tried: list[Mapping[str, Any]] = []

    def encode(self, record: Record) -> Encoded:
        """See `Encoder`."""
        encoded = self._encode(record)
        if not record.images:
            check_no_image(encoded, self._seen, record)
        if record.images and not encoded.images:
            raise CalibrationError("the chat template leaves its images out", record.where)
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
        options = dict(record.image_options)
        with self._processing(record):
            text, prompt = rendered(placed(record), self._rendered, record.where)
            if images and options not in self._tried:
                self._try(options, record.where)
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

    @contextmanager
    def _processing(self, record: Record) -> Iterator[None]:
        """What the processor raises over a record and its options, as a fault of the record."""
        with taking("processor", record), warnings.catch_warnings():
            # Of options by the names that the family's own code has for them.
            warnings.simplefilter("ignore", FutureWarning)
            yield

    def _try(self, options: dict[str, Any], where: str) -> None:
        """Whether the processor of images knows these options, and can work with them and its own."""
        prepare = self._processor.image_processor
        known = sorted(set(prepare.valid_kwargs.__annotations__) - OF_TENSORS)
        check_known(options, known, type(prepare).__name__, where)
        for name, value in options.items():
            if name not in ANY_NUMBER and not all(map(_is_positive, _values(value))):
                raise CalibrationError(f"image_options has {name}: {shown(repr(value))}", where, "numbers above 0")
        endless = CalibrationError("the image processor takes too long, or too much memory, by its options", where)
        with cpu_limit(endless), memory_limit(endless):
            resizes = options.get("do_resize", getattr(prepare, "do_resize", True))
            images = TRIALS if resizes else TRIALS[:1]
            text = self._rendered([{"role": "user", "content": [{"type": "image"}] * len(images)}], tokenize=False)
            self._processor(text=[text], images=[*images], return_tensors="pt", images_kwargs=options)
        self._tried.append(options)


def check_known(options: Iterable[str], known: Collection[str], who: str, where: str) -> None:
    """Whether `who` prepares images knows these options.

    Raises:
        CalibrationError: naming the first that is unknown, and those that there are.
    """
    unknown = [name for name in options if name not in known]
    if unknown:
        raise CalibrationError(
            f"image_options has {shown(repr(unknown[0]))}, which {who} does not know",
            where,
            f"one of {', '.join(known)}",
        )


def _values(option: Any) -> Iterable[Any]:
    return option.values() if isinstance(option, Mapping) else [option]


def _is_positive(value: Any) -> bool:
    return isinstance(value, bool | str) or value > 0


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
        if not isinstance(part, dict) or not _is_known(part):
            wrong = shown(repr(part if isinstance(given, list) else given))
            raise ValueError(f"a message's content is {wrong}, and no text or parts of text and image")
        if part.get("type") == "image":
            parts.append({"type": "image"})
            continue
        first, *others = part["text"].split(PLACE) if seen else [part["text"]]
        parts += [{"type": "text", "text": first}] if first else []
        for text in others:
            # What a template puts behind an image is its own affair.
            text = text.removeprefix("\n")
            parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts


def _is_known(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


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
