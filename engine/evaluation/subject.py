"""A model under evaluation: its checkpoint, and how it reads records. Checked without a weight being read.

Knows no measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.calibration.encoder import encoder_of
from engine.calibration.records import Record, check_seen
from engine.calibration.samples import Encoded, check_ids
from engine.checkpoints.adapters import is_adapter
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import main_dtype, read_model_header
from engine.checkpoints.tensors import Checkpoint
from engine.errors import CalibrationError, CheckpointError
from engine.evaluation.items import DataSet, Item
from engine.models.forward import language_model
from engine.models.loading import load_model_config, load_tokenizer
from engine.models.skeleton import build_generation_skeleton, load_weights


@dataclass(frozen=True)
class Options:
    """`dtype` is one of torch's floats, or auto: what most of a model's own bytes are. `remote_code`: code that comes
    with a model may run.
    """

    batch_size: int = 16
    max_new_tokens: int = 64
    max_length: int = 2048
    dtype: str = "auto"
    remote_code: bool = False


class Subject:
    """A model under evaluation; without weights until they are loaded."""

    def __init__(self, model: str, options: Options) -> None:
        """`model` is a path, URI or hub id.

        Raises:
            CheckpointError: it is no full checkpoint that transformers takes.
        """
        self.folder, self.options = find_model(model, ROOT), options
        if is_adapter(self.folder):
            raise CheckpointError(
                "an adapter is no model by itself",
                str(self.folder),
                "a full checkpoint",
                "merge it into its base first: `merge_method: task_arithmetic`, `weight: 1`",
            )
        self.header = read_model_header(self.folder)
        self.dtype_name = main_dtype(self.header) if options.dtype == "auto" else options.dtype
        config = load_model_config(self.folder, options.remote_code)
        self.model, self._places = build_generation_skeleton(config, self.header.tensors, self._dtype, self.folder)

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype_name)
        return found

    def check_alike(self, expert: Subject) -> None:
        """Whether an expert says its hidden states and logits of the same tokens in the same sizes.

        Raises:
            CheckpointError: it does not.
        """
        sizes = [
            (one.header.vocab_size, one.header.num_layers, one.header.text_config.get("hidden_size"))
            for one in (self, expert)
        ]
        if sizes[0] != sizes[1]:
            told = [f"{tokens} tokens, {blocks} blocks, {width} features" for tokens, blocks, width in sizes]
            raise CheckpointError(f"the expert has {told[1]}", str(expert.folder), f"those of {self.folder}: {told[0]}")

    def load(self, device: torch.device) -> None:
        """Give the model its weights, on the device or over all GPUs that are visible."""
        checkpoint = Checkpoint(self.folder, self.header.tensors)
        load_weights(self.model, self._places, self._dtype, device, self.folder, checkpoint.read)


class Reader:
    """Records into tokens as a model takes them, within its bounds."""

    def __init__(self, subject: Subject, data: DataSet) -> None:
        self._header, self._options = subject.header, subject.options
        folder, code = subject.folder, subject.options.remote_code
        records = [record for item in data.items for record in item.wholes]
        self._encoder = encoder_of(subject.header, folder, folder, subject.dtype_name, code, records)
        self.tokenizer: Any = None if data.kind == "text" else load_tokenizer(folder, code)
        self.stops = stop_tokens(subject.model, self.tokenizer)

    def check(self, item: Item) -> None:
        """Whether the model can take an item.

        Raises:
            CalibrationError: it cannot, naming the record.
        """
        for whole in item.wholes:
            self.whole(item, whole)
        if item.prompt is not None:
            self.prompt(item)

    def whole(self, item: Item, record: Record) -> Encoded:
        """A text, of which all tokens count; or a record with its response, and nothing behind its end."""
        encoded = self._encoded(record)
        if item.prompt is not None:
            return ended(encoded, self.stops, record.where)
        if len(encoded.input_ids) < 2:
            raise CalibrationError("the record has one token, and nothing is expected of it", record.where)
        return encoded

    def prompt(self, item: Item) -> Encoded:
        """What the model is to write behind."""
        assert item.prompt is not None
        encoded, places = self._encoded(item.prompt), self._header.text_config.get("max_position_embeddings")
        longest = len(encoded.input_ids) + self._options.max_new_tokens
        if type(places) is int and longest > places:
            raise CalibrationError(
                f"{longest:,} tokens with those that are written, and the model has {places:,} places",
                item.prompt.where,
                do="lower --max-new-tokens",
            )
        return encoded

    def _encoded(self, record: Record) -> Encoded:
        check_seen(record.images, self._header.takes_images, record.where)
        encoded = self._encoder.encode(record)
        check_ids(encoded.input_ids, self._header.vocab_size, record.where)
        if len(encoded.input_ids) > self._options.max_length:
            raise CalibrationError(
                f"the record has {len(encoded.input_ids):,} tokens",
                record.where,
                f"at most {self._options.max_length:,}",
                "raise --max-length, or shorten it",
            )
        return encoded


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the generation config, and the tokenizer's own, which comes first."""
    told = language_model(model).generation_config.eos_token_id
    told = [told] if isinstance(told, int) else list(told or ())
    own = getattr(tokenizer, "eos_token_id", None)
    return list(dict.fromkeys(([] if own is None else [own]) + told))


def ended(encoded: Encoded, stops: Sequence[int], where: str) -> Encoded:
    """The record with one end of its response, as a model would write it, and nothing behind that.

    Raises:
        CalibrationError: there is no response, or nothing before it.
    """
    start = encoded.response
    if not start or start >= len(encoded.input_ids):
        raise CalibrationError("the record makes no tokens before its response, or none of it", where)
    ids = list(encoded.input_ids)
    end = next((place for place in range(start, len(ids)) if ids[place] in stops), None)
    return replace(encoded, input_ids=ids + list(stops[:1]) if end is None else ids[: end + 1])
