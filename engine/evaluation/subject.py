"""A model under evaluation: its checkpoint, and its encoding of records. Checks read no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from engine.calibration.bounded_encoder import BoundedEncoder
from engine.calibration.encoder import encoder_of
from engine.calibration.records import Record, check_seen
from engine.calibration.samples import Encoded, check_ids
from engine.checkpoints.adapter_file import CONFIG, DELTA
from engine.checkpoints.adapters import is_adapter, read_adapter_header
from engine.checkpoints.find import ROOT, ModelName, find_model, portable, split_adapter
from engine.checkpoints.headers import main_dtype, read_json, read_model_header
from engine.errors import CalibrationError, CheckpointError
from engine.evaluation.items import DataSet, Item
from engine.models.devices import ONE_DEVICE, Room
from engine.models.forward import language_model
from engine.models.loading import load_model_config, load_tokenizer
from engine.models.names import positions_of
from engine.models.skeleton import build_generation_skeleton, load_weights
from engine.planning.open_models import open_checkpoint
from engine.planning.plan import ModelPlan
from engine.planning.structures import Structures, without_tied_head
from engine.storage.paths import is_uri
from engine.untrusted import shown


@dataclass(frozen=True)
class Options:
    """The options of an evaluation.

    Attributes:
        batch_size: Records per forward pass.
        max_new_tokens: Maximum number of generated tokens per answer.
        max_length: Maximum number of tokens of a record.
        dtype: The name of a floating-point dtype, or `auto`: the dtype of most of a model's bytes.
        remote_code: Allow Python code in a model's folder to run.
    """

    batch_size: int = 16
    max_new_tokens: int = 64
    max_length: int = 2048
    dtype: str = "auto"
    remote_code: bool = False


def named(model: str, folder: Path, remote_code: bool = False) -> ModelName:
    """Return the checkpoint and the adapter that a user calls `model`, by names that are valid on every node.

    `model` is a path relative to `folder`, a URI or a hub id, or two of these with a + between them. An adapter alone
    belongs to the base that its adapter_config.json names, a folder or a hub id.

    Raises:
        CheckpointError: there is no such model, the model after the + is no adapter, or the one before it is one; or
            the base of an adapter cannot be found, or could run code.
    """
    checkpoint, adapter = split_adapter(model, folder)
    place = find_model(checkpoint, folder)
    if adapter is None and is_adapter(place):
        checkpoint, adapter = _base_of(model, place, folder, remote_code), model
        place = find_model(checkpoint, folder)
    if is_adapter(place):
        raise CheckpointError("the base of the adapter is an adapter", str(place), "a full checkpoint")
    if adapter is None:
        return ModelName(portable(checkpoint, place, folder))
    added = find_model(adapter, folder)
    if not is_adapter(added):
        raise CheckpointError("the model after the + is not an adapter", str(added))
    return ModelName(portable(checkpoint, place, folder), portable(adapter, added, folder))


def _base_of(adapter: str, its_folder: Path, folder: Path, remote_code: bool) -> str:
    """Return the base that an adapter's config names, once it is found."""
    file = its_folder / (DELTA if (its_folder / DELTA).exists() else CONFIG)
    config, where = read_json(file), str(file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if remote_code:
        # A file of the adapter would choose whose code runs.
        what = "an adapter alone cannot be evaluated with --trust-remote-code"
        raise CheckpointError(what, where, do=f"name the base: BASE+{adapter}")
    if not isinstance(base, str) or not base or is_uri(base):
        raise CheckpointError("the adapter's config names no base", where, do=f"name the base: BASE+{adapter}")
    try:
        place = find_model(base, folder)
        if isinstance(revision, str) and portable(base, place, folder) != str(place):
            base = f"{base}@{revision}"
            find_model(base, folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base that the adapter's config names cannot be found: {shown(repr(base), 1000)}",
            where,
            do=f"name the base: BASE+{adapter}",
        ) from error
    return base


class Subject:
    """A model under evaluation, on the meta device until `load` gives it its weights."""

    def __init__(self, model: ModelName, options: Options) -> None:
        """Read the headers of a model of `named`.

        Raises:
            CheckpointError: transformers cannot load the checkpoint, or the adapter does not fit it.
        """
        self.folder, self.options = find_model(model.checkpoint, ROOT), options
        self.header, added = read_model_header(self.folder), None
        if model.adapter is not None:
            self.header = without_tied_head(self.header)
            structures = Structures(self.header, required=False)
            self.header = replace(self.header, roles=structures.base.roles)
            adapter = read_adapter_header(find_model(model.adapter, ROOT), self.header, structures.tensor)
            added = ModelPlan(model.adapter, adapter)
        self._plan = ModelPlan(model.checkpoint, self.header, adapter=added)
        self.dtype_name = main_dtype(self.header) if options.dtype == "auto" else options.dtype
        config = load_model_config(self.folder, options.remote_code)
        self.model, self._places = build_generation_skeleton(config, self.header.tensors, self._dtype, self.folder)
        self.positions = positions_of(self.model)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def check_alike(self, expert: Subject) -> None:
        """Check that an expert has the same vocabulary size, number of blocks and hidden size.

        Raises:
            CheckpointError: it does not.
        """
        sizes = [
            (model.header.vocab_size, model.header.num_layers, model.header.text_config.get("hidden_size"))
            for model in (self, expert)
        ]
        if sizes[0] != sizes[1]:
            own, other = (f"{tokens} tokens, {blocks} blocks, {width} features" for tokens, blocks, width in sizes)
            raise CheckpointError(f"the expert has {other}", str(expert.folder), f"{own}, as in {self.folder}")

    def load(self, device: torch.device, room: Room = ONE_DEVICE) -> None:
        """Load the weights onto the device and the other GPUs of `room`."""
        read = open_checkpoint(self._plan).read
        load_weights(self.model, self._places, self._dtype, device, self.folder, read, room)


class Reader:
    """Encodes the records of a data set for a model, within the model's bounds and those of the options.

    The tokenizer runs in a child process with limits, which ends with the context.
    """

    def __init__(self, subject: Subject, data: DataSet) -> None:
        """Load the tokenizer.

        Raises:
            CheckpointError: it cannot be loaded within the limits.
        """
        self._subject, self._header, self._options = subject, subject.header, subject.options
        folder, code = subject.folder, subject.options.remote_code
        records = [record for item in data.items for record in item.wholes]
        self._encoder = BoundedEncoder(
            lambda: encoder_of(subject.header, folder, folder, subject.dtype_name, code, records),
            folder,
            lambda: None if data.kind == "text" else load_tokenizer(folder, code),
        )
        self.stops = stop_tokens(subject.model, self._encoder.end_token())

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._encoder.close()

    def check(self, item: Item) -> None:
        """Check that the model can process an item.

        Raises:
            CalibrationError: it cannot.
        """
        for whole in item.wholes:
            self.whole(item, whole)
        if item.prompt is not None:
            self.prompt(item)

    def whole(self, item: Item, record: Record) -> Encoded:
        """Return the tokens of a text, or of a record up to the first end token of its response."""
        encoded = self._encoded(record)
        if item.prompt is not None:
            encoded = ended(encoded, self.stops, record.where)
            self._check_positions(encoded, record.where)
            return encoded
        if len(encoded.input_ids) < 2:
            raise CalibrationError(
                "the record has a single token, which has no loss", record.where, "at least 2 tokens"
            )
        return encoded

    def prompt(self, item: Item) -> Encoded:
        """Return the tokens of the prompt of an item, from which the model generates."""
        assert item.prompt is not None
        encoded, positions = self._encoded(item.prompt), self._subject.positions
        if positions is None:
            positions = self._header.text_config.get("max_position_embeddings")
        prompt = len(encoded.input_ids)
        longest = prompt + self._options.max_new_tokens
        if type(positions) is int and longest > positions:
            raise CalibrationError(
                f"prompt and answer may have {longest:,} tokens, and the model has {positions:,} positions",
                item.prompt.where,
                do="lower --max-new-tokens, or shorten the record" if prompt < positions else "shorten the record",
            )
        return encoded

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of generated token ids."""
        return self._encoder.decode(rows)

    def _encoded(self, record: Record) -> Encoded:
        check_seen(record.images, self._header.takes_images, record.where)
        encoded = self._encoder.encode(record)
        check_ids(encoded.input_ids, self._header.vocab_size, record.where)
        self._check_positions(encoded, record.where)
        if len(encoded.input_ids) > self._options.max_length:
            raise CalibrationError(
                f"the record has {len(encoded.input_ids):,} tokens",
                record.where,
                f"at most {self._options.max_length:,}",
                "raise --max-length, or shorten the record",
            )
        return encoded

    def _check_positions(self, encoded: Encoded, where: str) -> None:
        tokens, most = len(encoded.input_ids), self._subject.positions
        if most is not None and tokens > most:
            raise CalibrationError(
                f"the record has {tokens:,} tokens, and the model has {most:,} positions",
                where,
                f"at most {most:,} tokens",
                "shorten the record",
            )


def stop_tokens(model: Any, own: int | None) -> list[int]:
    """Return the ids of the end tokens: the tokenizer's `own`, then those of the generation config."""
    eos = language_model(model).generation_config.eos_token_id
    of_config = [eos] if isinstance(eos, int) else list(eos or ())
    return list(dict.fromkeys(([] if own is None else [own]) + of_config))


def ended(encoded: Encoded, stops: Sequence[int], where: str) -> Encoded:
    """Return the record with its response ended by one end token, as a model would generate it.

    Raises:
        CalibrationError: there are no tokens of the response, or none before it.
    """
    start = encoded.response
    if not start or start >= len(encoded.input_ids):
        raise CalibrationError("the record has no tokens in its response, or none before it", where)
    ids = list(encoded.input_ids)
    end = next((place for place in range(start, len(ids)) if ids[place] in stops), None)
    return replace(encoded, input_ids=ids + list(stops[:1]) if end is None else ids[: end + 1])
