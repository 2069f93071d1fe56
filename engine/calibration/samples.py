"""Unlabelled samples: calibration records made into what a model takes, in the method's order.

An encoder (`engine.calibration.text_encoder`) makes tokens of a record; this module cuts, checks and numbers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.calibration.records import Record, text_of
from engine.errors import CalibrationError
from engine.planning.plan import Plan
from engine.untrusted import shown

Spans = tuple[tuple[int, int], ...]


# Tokens of an image, if nothing says how many: of some 900 x 900 pixels in Qwen2-VL.
IMAGE_TOKENS = 1024


@dataclass(frozen=True)
class Sample:
    """One calibration sample x ∈ Dₖ: `expert` is k, `index` its place in the list, `where` its file and record.

    `cut` is the number of tokens beyond `max_length` that were left out; `generate` the number of new tokens that the
    expert writes first, as the response to this prompt. `masked_spans` are the spans of positions whose losses do not
    count, `loss_weight` is βₖ or what its file says instead, and `inputs` whether it has more inputs than its tokens.
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
        """Tokens of the sample, or as many as it may have when the expert has written its response."""
        return len(self.input_ids) + self.generate


@dataclass(frozen=True)
class Encoded:
    """A record as a model takes it: its tokens, and `inputs`, the tensors that its forward pass takes beside them.

    `is_prompt`: it still wants a response. `response` is the place of the first token of the one that it has; `images`
    are the spans of tokens that stand for images.
    """

    input_ids: Sequence[int]
    is_prompt: bool = False
    response: int | None = None
    images: Spans = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)


class Encoder(Protocol):
    """What makes tokens of records."""

    def encode(self, record: Record) -> Encoded:
        """Tokens and other inputs of a record; CalibrationError where it cannot be."""


def make_samples(
    records: Sequence[Sequence[Record]],
    encoder: Encoder,
    plan: Plan,
    keep: Callable[[Sample, Mapping[str, Any]], None] | None = None,
) -> list[list[Sample]]:
    """Samples of each expert. `keep` takes what a sample has beside its tokens, if it has anything.

    Raises:
        CalibrationError: a record that makes no tokens, ids outside the vocabulary, images that `max_length` would cut,
        or no tokens whose losses would count.
    """
    samples: list[list[Sample]] = []
    for number, mine in enumerate(records):
        samples.append([])
        for index, record in enumerate(mine):
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
            f"its images end at token {max(stop for _, stop in encoded.images):,}, and no image can be cut",
            where,
            f"at most `max_length`, {options.max_length:,}, in the config's `calibration`",
            "raise it, or make images smaller by `image_options`",
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
    """Whether a record makes tokens, and a vocabulary of that size has them.

    Raises:
        CalibrationError: it does not.
    """
    if not ids:
        raise CalibrationError("the record makes no tokens", where)
    if not 0 <= min(ids) <= max(ids) < (vocabulary or max(ids) + 1):
        least, most = shown(str(min(ids))), shown(str(max(ids)))
        raise CalibrationError(
            f"token ids from {least} to {most}", where, f"ids below the vocabulary's size, {vocabulary}"
        )


def _uncounted(loss_tokens: str, encoded: Encoded, length: int, generate: int, where: str) -> Spans:
    """Spans of positions whose losses do not count: images, or all before the one that predicts the response.

    `auto` is `response` where there is any of it, else `text`.
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
            "the record has no response, and `loss_tokens: response` counts nothing else",
            where,
            "a question with its `response`, or messages that end with the assistant's",
            "`calibration.generate_responses` has the expert write one",
        )
    if start - 1 >= length:
        raise CalibrationError(
            f"nothing is left of its response at `max_length` {length}", where, do="raise `calibration.max_length`"
        )
    return ((0, start - 1),) if start > 1 else ()


def loss_positions(masked_spans: Spans, length: int) -> list[int] | None:
    """The positions of a sample of `length` tokens whose losses count; None: all of them."""
    if not masked_spans:
        return None
    left_out = {place for start, stop in masked_spans for place in range(start, stop)}
    return [place for place in range(length) if place not in left_out]


def about_tokens(plan: Plan, records: Sequence[Sequence[Record]]) -> list[list[int]]:
    """About how many tokens each sample has, without a tokenizer: four characters of a text make one, and an image as
    many as the model's configuration says, or IMAGE_TOKENS.
    """
    calibration = plan.config.calibration

    def count(record: Record) -> int:
        ids = record.fields.get("input_ids")
        text = len(text_of(record.fields)) // 4 + 1 + calibration.generate_responses
        images = len(record.images) * _image_tokens(plan.base_header.config, record.image_options)
        return min(len(ids) if ids is not None else text + images, calibration.max_length)

    return [[count(record) for record in mine] for mine in records]


def _image_tokens(config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """About how many tokens an image has at most: tiles of so many each, by the names that families have for these."""
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
