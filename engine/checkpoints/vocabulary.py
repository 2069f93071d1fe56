"""Which rows of embedding and head belong to which tokens, where models have vocabularies of their own.

A merge has the tokens of one model: the base, or the one that `tokenizer_source` names. The models' tokens must have
the same numbers as far as they share them; then a longer vocabulary is cut, and a shorter one filled up. From headers
and tokenizer files alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoints.find import check_folder
from engine.checkpoints.headers import TEXT_SECTIONS, ModelHeader
from engine.errors import CheckpointError
from engine.untrusted import TOKENIZER_BYTES, check_regular, library_errors_as, shown

HEADS = re.compile(r"(.*\.)?(lm_head|embed_out|output)\.weight$")


EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")


def has_tokens_for_rows(model: ModelHeader, tensor: str) -> bool:
    """Whether each row of a tensor belongs to a token: the embedding, and the head."""
    shape = model.tensors[tensor].shape
    return bool(shape) and (shape[0] == model.vocab_size or bool(EMBEDDINGS.match(tensor) or HEADS.match(tensor)))


def is_matrix(shape: Sequence[int], is_vocabulary: bool) -> bool:
    """Whether it maps features to features: two dimensions, and no row a token, as those of embeddings and heads."""
    return len(shape) == 2 and min(shape) > 1 and not is_vocabulary


def tokens_of(folder: Path) -> dict[str, int] | None:
    """Tokens and their numbers; None where the folder has no tokenizer.json.

    Raises:
        CheckpointError: it cannot be read, or another file of the folder is none to be read (`headers.check_folder`).
    """
    check_folder(folder)
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    check_regular(file, TOKENIZER_BYTES, CheckpointError)
    from tokenizers import Tokenizer

    with library_errors_as(lambda told: CheckpointError(f"not a tokenizer: {told}", str(file))):
        tokens: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    return tokens


def check_tokens(model: ModelHeader, wanted: ModelHeader, wanted_folder: Path, where: str) -> None:
    """Whether the tokens that a model shares with those of `wanted` have the same numbers there.

    Raises:
        CheckpointError: a token that is moved, or no tokenizer.json to tell where the sizes differ.
    """
    ours, theirs = tokens_of(wanted_folder), tokens_of(model.folder)
    if ours is None or theirs is None:
        if model.vocab_size == wanted.vocab_size:
            return
        raise CheckpointError("there is no tokenizer.json to tell which of its tokens are the output's", where)
    places = {place: token for token, place in ours.items()}
    for token, place in theirs.items():
        if ours.get(token, place) != place or places.get(place, token) != token:
            raise CheckpointError(
                f"its token {shown(repr(token))} has the number {place}",
                where,
                f"the output's tokenizer has {shown(repr(places.get(place)))} there, and that at {ours.get(token)}",
                "give models whose vocabularies differ only by tokens at their ends",
            )


def with_rows_of(base: ModelHeader, donor: ModelHeader, donor_folder: Path) -> ModelHeader:
    """The base with as many rows in embedding and head as the donor has.

    Raises:
        CheckpointError: the tokens that both have are not the same, or the donor has no such tensor.
    """
    check_tokens(base, donor, donor_folder, f"the base ({base.folder})")
    tensors = dict(base.tensors)
    for name, tensor in base.tensors.items():
        if has_tokens_for_rows(base, name):
            other = donor.tensors[rows_in(donor, name)].shape
            if other[1:] != tensor.shape[1:]:
                raise CheckpointError(f"{name!r} has shape {other}", str(donor_folder), f"the base's {tensor.shape}")
            tensors[name] = replace(tensor, shape=other)
    return replace(base, config=_with_size(base.config, donor.vocab_size), tensors=tensors)


def rows_in(donor: ModelHeader, tensor: str) -> str:
    """The donor's name for a tensor of tokens: its embedding where it has no head of its own.

    Raises:
        CheckpointError: it has neither.
    """
    names = [tensor, *(name for name in donor.tensors if EMBEDDINGS.match(name))]
    found = next((name for name in names if name in donor.tensors), None)
    if found is None:
        raise CheckpointError(f"it has no {tensor!r}", str(donor.folder), "the rows of the tokenizer that is asked for")
    return found


def _with_size(config: dict[str, Any], size: int | None) -> dict[str, Any]:
    for key in TEXT_SECTIONS:
        nested = config.get(key)
        if isinstance(nested, dict) and "vocab_size" in nested:
            return config | {key: nested | {"vocab_size": size}}
    return config | {"vocab_size": size}
