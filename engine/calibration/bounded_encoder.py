"""An encoder in a child process with limits, since tokenizers, processors and chat templates come from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch

from engine.bounded_process import LIMITS, BoundedProcess
from engine.calibration.records import Record
from engine.calibration.samples import Encoded, Encoder
from engine.errors import CalibrationError, InputError
from engine.models.loading import beyond_limits, reading


class BoundedEncoder:
    """Encoder whose tokenizer and processor are loaded and called in a child process. It decodes as well.

    Args:
        make: Makes the encoder, in the child.
        folder: The folder of tokenizer and processor, for errors.
        tokenizer: Loads the tokenizer for `decode` and `end_token`, in the child. Its result may be None without them.

    Raises:
        InputError: `make` or `tokenizer` raised it.
        CheckpointError: They exceed the limits of `engine.bounded_process`.
    """

    def __init__(self, make: Callable[[], Encoder], folder: Path, tokenizer: Callable[[], Any] = lambda: None) -> None:
        self._folder, self._beyond = folder, beyond_limits(folder)
        self._process = BoundedProcess(lambda: _Served(make(), tokenizer(), folder), self._beyond)

    def encode(self, record: Record) -> Encoded:
        """Encode a record. See `Encoder.encode`.

        Raises:
            CalibrationError: The record cannot be encoded, or not within the limits.
        """

        def beyond(fails: str) -> InputError:
            return CalibrationError(
                f"the tokenizer or processor in {self._folder} {fails} on this record",
                record.where,
                LIMITS,
                "shorten the record, or use another tokenizer",
            )

        (ids, is_prompt, response, images), inputs = self._process.call("encode", record, fault=beyond)
        spans = tuple((start, stop) for start, stop in images)
        return Encoded(ids, is_prompt, response, spans, safetensors.torch.load(inputs) if inputs else {})

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids, without special tokens.

        Raises:
            CheckpointError: The tokenizer cannot decode them, or not within the limits.
        """
        texts: list[str] = self._process.call("decode", [list(row) for row in rows], fault=self._beyond)[0]
        return texts

    def end_token(self) -> int | None:
        """Return the id of the tokenizer's end token; None if it has none, or if there is no tokenizer."""
        token: int | None = self._process.call("end_token", fault=self._beyond)[0]
        return token

    def close(self) -> None:
        """End the child process."""
        self._process.close()

    def __enter__(self) -> BoundedEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Served:
    """What runs in the child: its methods return a value for JSON, and bytes."""

    def __init__(self, encoder: Encoder, tokenizer: Any, folder: Path) -> None:
        self._encoder, self._tokenizer, self._folder = encoder, tokenizer, folder

    def encode(self, record: Record) -> tuple[Any, bytes]:
        encoded = self._encoder.encode(record)
        value = [list(encoded.input_ids), encoded.is_prompt, encoded.response, encoded.images]
        return value, safetensors.torch.save(dict(encoded.inputs)) if encoded.inputs else b""

    def decode(self, rows: list[list[int]]) -> tuple[Any, bytes]:
        with reading("its tokenizer cannot decode an answer", self._folder):
            return [self._tokenizer.decode(row, skip_special_tokens=True) for row in rows], b""

    def end_token(self) -> tuple[Any, bytes]:
        return getattr(self._tokenizer, "eos_token_id", None), b""
