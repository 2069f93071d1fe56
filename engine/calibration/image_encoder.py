"""Encode records with images as token ids and pixel inputs, with a processor of transformers."""

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

# Marks the place of an image in the text of a record.
PLACE = "<image>"

# Outputs of processors that mark image tokens with 1 and text tokens with 0.
MARKS = ("mm_token_type_ids", "token_type_ids")

# Options that may be 0. All others are sizes and counts, or booleans.
ANY_NUMBER = ("resample", "image_mean")

# Options of processors that concern tensors and devices, not images. They are refused.
OF_TENSORS = {"return_tensors", "data_format", "input_data_format", "device", "disable_grouping"}

# Images for a trial of the options: a size that all patch sizes divide, and a single pixel that must be enlarged.
TRIALS = (Image.new("RGB", (448, 448)), Image.new("RGB", (1, 1)))


class ImageEncoder:
    """Encoder of text and images with a processor of transformers. Float inputs are converted to `dtype`."""

    def __init__(self, processor: Any, dtype: torch.dtype) -> None:
        self._processor, self._dtype = processor, dtype
        self._template = processor.chat_template or processor.tokenizer.chat_template
        self._text = TextEncoder(processor.tokenizer)
        self._seen = {processor.image_token_id, getattr(processor, "video_token_id", None)} - {None}
        self._tried: list[Mapping[str, Any]] = []

    def encode(self, record: Record) -> Encoded:
        """Encode a record. See `Encoder.encode`."""
        encoded = self._encode(record)
        if not record.images:
            check_no_image(encoded, self._seen, record)
        if record.images and not encoded.images:
            raise CalibrationError("the chat template drops the images of the record", record.where)
        return encoded

    def _encode(self, record: Record) -> Encoded:
        if not record.images and (record.field in ("input_ids", "text", "prompt") or not self._template):
            return self._text.encode(record)
        if not self._template:
            raise CalibrationError(
                "the record has images, but the model has no chat template to place them",
                record.where,
                do="set `tokenizer_source` to a model that has a chat template",
            )
        images = [read_image(path, record.where) for path in record.images]
        options = dict(record.image_options)
        with self._processing(record):
            text, prompt = rendered(placed(record), self._rendered, record)
            if images and options not in self._tried:
                self._try(options, record.where)
            output = self._processor(
                text=[text], images=images or None, return_tensors="pt", images_kwargs=options, add_special_tokens=False
            )
            tokenizer = self._processor.tokenizer
            text_ids, prompt_ids = (
                tokenizer(part, add_special_tokens=False).input_ids if part else [] for part in (text, prompt)
            )
        ids_T = output["input_ids"][0]
        marks_BT = next(
            (output[name] for name in MARKS if name in output), ids_T[None] == self._processor.image_token_id
        )
        # All image tokens come before the last answer, so the answer has as many tokens as in the plain text.
        answer = None if prompt is None else len(ids_T) - len(text_ids) + in_common(prompt_ids, text_ids)
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
        """Turn exceptions of the processor into errors about the record."""
        with taking("processor", record), warnings.catch_warnings():
            # Some families warn about options under the names of their original code.
            warnings.simplefilter("ignore", FutureWarning)
            yield

    def _try(self, options: dict[str, Any], where: str) -> None:
        """Check that the image processor has these options, and that it works with them in bounded time and memory."""
        prepare = self._processor.image_processor
        known = sorted(set(prepare.valid_kwargs.__annotations__) - OF_TENSORS)
        check_known(options, known, type(prepare).__name__, where)
        for name, value in options.items():
            if name not in ANY_NUMBER and not all(map(_is_positive, _values(value))):
                raise CalibrationError(f"`image_options` has {name}: {shown(repr(value))}", where, "numbers above 0")
        endless = CalibrationError("the image processor takes too long or too much memory with its options", where)
        with cpu_limit(endless), memory_limit(endless):
            resizes = options.get("do_resize", getattr(prepare, "do_resize", True))
            images = TRIALS if resizes else TRIALS[:1]
            text = self._rendered([{"role": "user", "content": [{"type": "image"}] * len(images)}], tokenize=False)
            self._processor(text=[text], images=[*images], return_tensors="pt", images_kwargs=options)
        self._tried.append(options)


def check_known(options: Iterable[str], known: Collection[str], processor: str, where: str) -> None:
    """Check that an image processor has these options.

    Args:
        options: Names of the options.
        known: Names of the processor's options.
        processor: The processor's name, for the error.
        where: The record, for the error.

    Raises:
        CalibrationError: An option is unknown.
    """
    unknown = [name for name in options if name not in known]
    if unknown:
        raise CalibrationError(
            f"`image_options` has {shown(repr(unknown[0]))}, which {processor} does not support",
            where,
            f"one of {', '.join(known)}",
        )


def _values(option: Any) -> Iterable[Any]:
    return option.values() if isinstance(option, Mapping) else [option]


def _is_positive(value: Any) -> bool:
    return isinstance(value, bool | str) or value > 0


def placed(record: Record) -> Messages:
    """Return the chat of a record with its content as parts of text and images.

    Image parts and <image> marks decide where the images are. Without any, the images precede the text of the user's
    first message.

    Raises:
        CalibrationError: The number of places differs from the number of images.
        ValueError: The content of a message is not valid.
    """
    seen = bool(record.images)
    messages = [{**message, "content": _parts(message["content"], seen)} for message in messages_of(record)]
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    first = next((message for message in messages if message["role"] == "user"), None)
    if not places and first is not None:
        first["content"] = [{"type": "image"}] * len(record.images) + first["content"]
        places = len(record.images)
    if places != len(record.images):
        raise CalibrationError(
            f"the record has {places} place(s) for images, but {len(record.images)} image(s)", record.where
        )
    return messages


def _parts(content: Any, seen: bool) -> list[Mapping[str, str]]:
    """Return the content of a message as parts. If the record has images (`seen`), texts are split at <image>."""
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts: list[Mapping[str, str]] = []
    for part in given if isinstance(given, list) else [None]:
        if not isinstance(part, dict) or not _is_known(part):
            wrong = shown(repr(part if isinstance(given, list) else given))
            raise ValueError(f"the content of a message is {wrong}, not a string or parts of text and images")
        if part.get("type") == "image":
            parts.append({"type": "image"})
            continue
        first, *others = part["text"].split(PLACE) if seen else [part["text"]]
        parts += [{"type": "text", "text": first}] if first else []
        for text in others:
            # The chat template decides what follows an image.
            text = text.removeprefix("\n")
            parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts


def _is_known(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def spans(marks_T: Tensor) -> Spans:
    """Return (start, stop) of each run of tokens whose mark [T] is not 0."""
    runs, start = [], 0
    for marked, run in groupby(marks_T.bool().tolist()):
        length = len(list(run))
        if marked:
            runs.append((start, start + length))
        start += length
    return tuple(runs)


def kept(value: Any, dtype: torch.dtype) -> Tensor:
    """Return an output of a processor as a contiguous tensor; floats are copied to `dtype`."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return tensor.to(dtype, copy=True).contiguous() if tensor.is_floating_point() else tensor.contiguous()


def texts(content: Sequence[Mapping[str, str]], place: str) -> str:
    """Join the parts of a message to one text, with `place` and a newline for each image."""
    return "".join(part["text"] if part["type"] == "text" else f"{place}\n" for part in content)
