"""Calibration samples: encoded records, truncated, checked and numbered per expert.

`engine.calibration.encoder` chooses the encoder that turns records into token ids and pixel inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.calibration.records import Record, text_of
from engine.errors import CalibrationError
from engine.planning.plan import Plan
from engine.untrusted import shown

# (start, stop) of runs of positions.
Spans = tuple[tuple[int, int], ...]

# Estimated tokens of an image if the model's config does not give them: about 900 x 900 pixels in Qwen2-VL.
IMAGE_TOKENS = 1024


@dataclass(frozen=True)
class Sample:
    """A calibration sample x ∈ Dₖ.

    Attributes:
        expert: k.
        index: Index among the samples of the expert.
        input_ids: Token ids.
        where: File and record, for messages.
        cut: Number of tokens beyond `max_length` that were dropped.
        generate: Maximum number of tokens of the response that the expert generates first.
        masked_spans: Positions whose losses do not count.
        loss_weight: βₖ, or the `loss_weight` of its file.
        inputs: Whether it has pixel inputs.
    """

    expert: int
    index: int
    input_ids: tuple[int, ...]
    where: str
    cut: int = 0
    generate: int = 0
    masked_spans: Spans = ()
    loss_weight: float = 1.0
    inputs: bool = False

    @property
    def tokens(self) -> int:
        """Maximum number of tokens, with the response that the expert generates."""
        return len(self.input_ids) + self.generate


@dataclass(frozen=True)
class Encoded:
    """An encoded record.

    Attributes:
        input_ids: Token ids.
        is_prompt: Whether it ends where a response would begin.
        response: Index of the first token of its response, None if it has none.
        images: Positions of image tokens.
        inputs: Pixel inputs: further tensors that the forward pass takes, by name.
    """

    input_ids: Sequence[int]
    is_prompt: bool = False
    response: int | None = None
    images: Spans = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)


class Encoder(Protocol):
    """Turns records into the inputs of a model."""

    def encode(self, record: Record) -> Encoded:
        """Return the token ids and pixel inputs of a record.

        Raises:
            CalibrationError: The record cannot be encoded.
        """


def make_samples(
    records: Sequence[Sequence[Record]],
    encoder: Encoder,
    plan: Plan,
    keep: Callable[[Sample, Mapping[str, Any]], None] | None = None,
) -> list[list[Sample]]:
    """Encode records as samples.

    Args:
        records: The records of each expert.
        encoder: The encoder.
        plan: The plan.
        keep: Called with each sample that has pixel inputs and with these inputs, which the sample itself omits.

    Returns:
        The samples of each expert.

    Raises:
        CalibrationError: A record has no tokens, ids outside the vocabulary, images beyond `max_length`, or no
            position whose loss counts.
    """
    samples: list[list[Sample]] = []
    for number, of_expert in enumerate(records):
        samples.append([])
        for index, record in enumerate(of_expert):
            encoded = encoder.encode(record)
            sample = _sample(record, encoded, plan, number, index)
            if encoded.inputs:
                assert keep is not None
                keep(sample, encoded.inputs)
            samples[-1].append(sample)
    return samples


def _sample(record: Record, encoded: Encoded, plan: Plan, expert: int, index: int) -> Sample:
    options, ids, where = plan.config.calibration, encoded.input_ids, record.where
    vocabulary = plan.base_header.vocab_size
    check_ids(ids, vocabulary, where)
    kept, cut = tuple(ids[: options.max_length]), max(0, len(ids) - options.max_length)
    if any(stop > len(kept) for _, stop in encoded.images):
        raise CalibrationError(
            f"the images end at token {max(stop for _, stop in encoded.images):,}, and images cannot be truncated",
            where,
            f"at most `calibration.max_length`, {options.max_length:,}",
            "raise `calibration.max_length`, or reduce the images with `image_options`",
        )
    generate = min(options.generate_responses, options.max_length - len(kept)) if encoded.is_prompt else 0
    return Sample(
        expert,
        index,
        kept,
        where,
        cut,
        generate,
        _uncounted(plan.config.parameters.loss_tokens, encoded, len(kept), generate, where),
        record.loss_weight,
        bool(encoded.inputs),
    )


def check_ids(ids: Sequence[int], vocabulary: int | None, where: str) -> None:
    """Check that a record has tokens and that their ids are within a vocabulary of that size (None: unknown).

    Raises:
        CalibrationError: There are no tokens, or an id is outside the vocabulary.
    """
    if not ids:
        raise CalibrationError("the record has no tokens", where)
    if not 0 <= min(ids) <= max(ids) < (vocabulary or max(ids) + 1):
        least, most = shown(str(min(ids))), shown(str(max(ids)))
        raise CalibrationError(
            f"the token ids are from {least} to {most}", where, f"ids from 0 to below the vocabulary size, {vocabulary}"
        )


def _uncounted(loss_tokens: str, encoded: Encoded, length: int, generate: int, where: str) -> Spans:
    """Return the positions whose losses do not count.

    With `text` these are the image tokens; with `response`, all positions before the one that predicts the response.
    `auto` is `response` if the sample has one, else `text`.
    """
    if loss_tokens == "all":
        return ()
    if loss_tokens == "text":
        return encoded.images
    start = length if generate and encoded.response is None else encoded.response
    if loss_tokens == "auto" and (start is None or start - 1 >= length):
        return encoded.images
    if start is None:
        raise CalibrationError(
            "the record has no response, but `loss_tokens` is `response`",
            where,
            "a `question` with a `response`, or `messages` that end with one of the assistant",
            "add a response, or set `calibration.generate_responses`",
        )
    if start - 1 >= length:
        raise CalibrationError(
            f"the response begins beyond the first {length} tokens, the `max_length`",
            where,
            do="raise `calibration.max_length`",
        )
    return ((0, start - 1),) if start > 1 else ()


def loss_positions(masked_spans: Spans, length: int) -> list[int] | None:
    """Return the positions of a sample of `length` tokens whose losses count, or None if all count."""
    if not masked_spans:
        return None
    masked = {position for start, stop in masked_spans for position in range(start, stop)}
    return [position for position in range(length) if position not in masked]


def about_tokens(plan: Plan, records: Sequence[Sequence[Record]]) -> list[list[int]]:
    """Estimate the number of tokens of each sample without a tokenizer.

    Four characters count as one token. An image counts as the model's config gives, or as IMAGE_TOKENS.
    """
    calibration = plan.config.calibration

    def count(record: Record) -> int:
        ids = record.fields.get("input_ids")
        text = len(text_of(record.fields)) // 4 + 1 + calibration.generate_responses
        images = len(record.images) * _image_tokens(plan.base_header.config, record.image_options)
        return min(len(ids) if ids is not None else text + images, calibration.max_length)

    return [[count(record) for record in of_expert] for of_expert in records]


def _image_tokens(config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Estimate the maximum tokens of an image: tiles times tokens per tile, under the keys of the known families."""
    vision = config.get("vision_config")
    patch = vision.get("patch_size") if isinstance(vision, dict) else None
    size, ratio = config.get("force_image_size"), config.get("downsample_ratio")
    if type(size) is int and type(patch) is int and patch > 0 and isinstance(ratio, int | float):
        tile, key, tiles = int((size // patch) ** 2 * ratio**2), "max_dynamic_patch", config.get("max_dynamic_patch")
    else:
        tile, key, tiles = config.get("image_seq_length", 0), "max_patches", None
    most = options.get(key, tiles if type(tiles) is int else 12)
    if type(tile) is int and tile and type(most) is int:
        return tile * (most + 1 if most > 1 else 1)
    fixed = config.get("mm_tokens_per_image")
    return fixed if type(fixed) is int else IMAGE_TOKENS
