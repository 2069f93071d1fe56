"""Vocabularies: rows of embedding and head, and the tokens that they belong to.

A weight-space merge with `tokenizer_source` has a `Vocabulary`, by which the rows of every model are put in the order
of the output's tokens. Without it, and in learned merges, tokens that models share must have the same ids; longer
vocabularies are then cut to the base's, and shorter ones filled up. Only headers and tokenizer files are read.
"""

from __future__ import annotations

import hashlib
import zlib
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.checkpoints.find import check_folder
from engine.checkpoints.headers import TEXT_SECTIONS, ModelHeader
from engine.checkpoints.structure import Role
from engine.errors import CheckpointError, ConfigError
from engine.untrusted import TOKENIZER_BYTES, check_regular, library_errors_as, shown

# The most ids of a tokenizer that belong to no token.
GAPS = 100_000


def has_tokens_for_rows(model: ModelHeader, tensor: str) -> bool:
    """Return whether each row of a tensor belongs to a token, as in embedding and head."""
    shape = model.tensors[tensor].shape
    return bool(shape) and (shape[0] == model.vocab_size or model.roles.get(tensor) in (Role.EMBEDDING, Role.HEAD))


def is_matrix(shape: Sequence[int], is_vocabulary: bool) -> bool:
    """Return whether a tensor of this shape maps features to features.

    It has two dimensions, both above 1, and its rows are not tokens (`is_vocabulary`: see `has_tokens_for_rows`).
    """
    return len(shape) == 2 and min(shape) > 1 and not is_vocabulary


def tokens_of(folder: Path) -> dict[str, int] | None:
    """Return the ids of a tokenizer's tokens, added tokens included; None if the folder has no tokenizer.json.

    Raises:
        CheckpointError: tokenizer.json cannot be read within the limits of a child process, or `check_folder` refuses
            the folder.
    """
    check_folder(folder)
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    check_regular(file, TOKENIZER_BYTES, CheckpointError)
    from engine.bounded_process import LIMITS, bounded

    def read() -> dict[str, int]:
        from tokenizers import Tokenizer

        with library_errors_as(lambda message: CheckpointError(f"not a tokenizer: {message}", str(file))):
            tokens: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        return tokens

    do = "replace the file, such as by that of the model that it was made from"
    tokens: dict[str, int] = bounded(read, lambda fails: CheckpointError(f"reading it {fails}", str(file), LIMITS, do))
    check_ids(tokens, file)
    return tokens


def check_ids(tokens: Mapping[str, int], where: Path) -> None:
    """Check that hardly any id of a tokenizer belongs to no token.

    Raises:
        CheckpointError: more than `GAPS` do; a merge would have rows for them.
    """
    last = max(tokens.values(), default=-1)
    if last >= len(tokens) + GAPS:
        what = f"the tokenizer has {len(tokens):,} tokens, with ids up to {last:,}"
        raise CheckpointError(what, str(where), f"at most {GAPS:,} ids without a token")


def check_tokens(model: ModelHeader, wanted: ModelHeader, wanted_folder: Path, where: str) -> None:
    """Check that a model's tokens have the same ids as in the output's tokenizer, as far as both have them.

    Args:
        model: The model to check.
        wanted: The header of the model with the output's tokenizer.
        wanted_folder: The folder of the output's tokenizer.
        where: The checked model's name in messages.

    Raises:
        CheckpointError: a token has another id, or the sizes differ and a tokenizer.json is missing.
    """
    ours, theirs = tokens_of(wanted_folder), tokens_of(model.folder)
    if ours is None or theirs is None:
        if model.vocab_size == wanted.vocab_size:
            return
        lacking = wanted_folder if ours is None else model.folder
        raise CheckpointError(
            "the vocabulary sizes differ, and without tokenizer.json the tokens cannot be compared",
            where,
            f"tokenizer.json in {lacking}",
        )
    tokens = {number: token for token, number in ours.items()}
    for token, number in theirs.items():
        if ours.get(token, number) != number or tokens.get(number, token) != token:
            raise CheckpointError(
                f"its token {shown(repr(token))} has id {number}",
                where,
                f"the ids of the output's tokenizer: {number} is {shown(repr(tokens.get(number)))}, "
                f"and this token is {ours.get(token)}",
                "use models whose vocabularies differ only by tokens at their ends",
            )


def packed(rows_R: npt.NDArray[np.int32]) -> str:
    """Return numbers of rows as a short text: most rows follow the one before."""
    return b64encode(zlib.compress(np.diff(rows_R, prepend=0).astype("<i4").tobytes())).decode()


def unpacked(text: str) -> npt.NDArray[np.int32]:
    """Return the numbers [R] that `packed` has made a text of."""
    return np.cumsum(np.frombuffer(zlib.decompress(b64decode(text)), "<i4"), dtype="<i4")


# Numbers of rows that stand for something else: no row, as the model lacks the token; and a row of no token.
LACKING, PADDING = -1, -2
# Models that stand for something else: zeros, the mean of the models that have the token, and a mean of all rows.
ZERO, MEAN, FILLED = -1, -2, -3


@dataclass(frozen=True)
class RowRule:
    """The row of token `token` in models that lack it; with `force`, in all. It is row `row` of model `model`, or ZERO.

    Models are counted from the base, which is 0.
    """

    token: int
    model: int
    row: int
    force: bool


@dataclass(frozen=True)
class Vocabulary:
    """The rows of embedding and head of a merged model, R, in the order of its tokens.

    The rows are as in mergekit 0.1.5. A model that lacks a token gets, for all of its tensors with a row per token: the
    row of the only model that has it; or the base's; or the mean of the models that have it; or zeros if none has it.
    Rules take precedence. Rows that belong to no token are the mean of the model's other rows.

    Attributes:
        rows: Number of rows R.
        own: For the base and each expert, the row of each token in that model's own tensors, LACKING or PADDING, as a
            text (`packed`).
        rules: Rules for single tokens.
        with_base: Whether the base counts as one of the models that have a token.
        tokenizer: SHA-256 of the files of a tokenizer that was made for the merge; "" if it is that of a model.
        notes: What a user should know about it.
    """

    rows: int
    own: tuple[str, ...] = field(repr=False)
    rules: tuple[RowRule, ...] = ()
    with_base: bool = True
    tokenizer: str = ""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that decides the rows and the tokenizer."""
        others = repr((self.rows, self.rules, self.with_base, self.tokenizer)).encode()
        return hashlib.sha256(b"".join((*(unpacked(rows).tobytes() for rows in self.own), others))).hexdigest()

    def of(self, models: Sequence[int], with_base: bool) -> Vocabulary:
        """Return the vocabulary of a tensor into which only some models are merged, counted as in `own`.

        The first of them is the tensor's base; `with_base`: it counts as one of the models that have a token.

        Raises:
            ConfigError: A rule takes a row of another model.
        """
        places = {ZERO: ZERO} | {model: place for place, model in reversed([*enumerate(models)])}
        other = next((rule for rule in self.rules if rule.model not in places), None)
        if other is not None:
            raise ConfigError(
                f"the row of token {other.token} is to be that of a model which is not merged into this tensor",
                "tokenizer.tokens",
                "a source of the first slice and of the last one",
            )
        rules = tuple(replace(rule, model=places[rule.model]) for rule in self.rules)
        return replace(self, own=tuple(self.own[model] for model in models), rules=rules, with_base=with_base)

    def gather(self, in_base_rows: Collection[int]) -> Gather:
        """Return the source of each row of a tensor, in which models of `in_base_rows` have no rows but the base's."""
        own_MR = np.stack([unpacked(self.own[0 if model in in_base_rows else model]) for model in range(len(self.own))])
        counted = slice(0 if self.with_base else 1, None)
        has_MR = own_MR[counted] >= 0
        count_R, first_R = has_MR.sum(axis=0), has_MR.argmax(axis=0) + counted.start
        model_R = np.select([own_MR[0] == PADDING, count_R == 0, count_R == 1], [FILLED, ZERO, first_R], MEAN)
        if self.with_base:
            model_R[(count_R > 1) & (own_MR[0] >= 0)] = 0
        row_R = np.take_along_axis(own_MR, np.maximum(model_R, 0)[None], axis=0)[0]
        for rule in self.rules:
            model_R[rule.token], row_R[rule.token] = rule.model, rule.row
            if rule.force:
                own_MR[:, rule.token] = LACKING
        return Gather(own_MR, model_R, row_R, range(len(self.own))[counted])


@dataclass(frozen=True)
class Gather:
    """The source of each row of a tensor of M models.

    Attributes:
        own_MR: The row of the model's own tensor; negative if the row is another one, the same for all models:
        model_R: that of this model, or ZERO, MEAN or FILLED,
        row_R: and of this row.
        counted: The models that have a part in MEAN.
    """

    own_MR: npt.NDArray[np.int32]
    model_R: npt.NDArray[np.int64]
    row_R: npt.NDArray[np.int32]
    counted: range


def is_gathered(model: ModelHeader, tensor: str) -> bool:
    """Return whether a `Vocabulary` decides the rows of a tensor: of embedding, head, and the head's bias.

    In a model whose embedding is not known, the number of rows tells.
    """
    if model.roles.get(tensor) in (Role.EMBEDDING, Role.HEAD):
        return True
    weight = f"{tensor.removesuffix('bias')}weight"
    if tensor.endswith(".bias") and model.roles.get(weight) is Role.HEAD:
        return True
    return Role.EMBEDDING not in model.roles.values() and has_tokens_for_rows(model, tensor)


def with_vocabulary(base: ModelHeader, vocabulary: Vocabulary | None) -> ModelHeader:
    """Return the base's header with the rows of a vocabulary, and its number of tokens in config.json."""
    if vocabulary is None:
        return base
    rows = vocabulary.rows
    tensors = {
        name: replace(tensor, shape=(rows, *tensor.shape[1:])) if is_gathered(base, name) else tensor
        for name, tensor in base.tensors.items()
    }
    return replace(base, config=_with_size(base.config, rows), tensors=tensors)


def _with_size(config: dict[str, Any], size: int | None) -> dict[str, Any]:
    for key in TEXT_SECTIONS:
        nested = config.get(key)
        if isinstance(nested, dict) and "vocab_size" in nested:
            return config | {key: nested | {"vocab_size": size}}
    return config | {"vocab_size": size}


def untie(base: ModelHeader) -> str:
    """Return a command that writes a copy of a base beside it, whose embedding and head are two tensors.

    Messages name it, and tests run it.
    """
    return (
        f'python -c "import torch, transformers as t; m = {load_command(base)}; '
        "[setattr(c, 'tie_word_embeddings', False) for c in (m.config, m.config.get_text_config())]; "
        "h = m.get_output_embeddings(); h.weight = torch.nn.Parameter(h.weight.detach().clone()); "
        f'm.save_pretrained({f"{base.folder}-untied"!r})"'
    )


def load_command(model: ModelHeader) -> str:
    """Return the Python that loads a model, with transformers as `t`."""
    kind = "ImageTextToText" if model.takes_images else "CausalLM"
    return f"t.AutoModelFor{kind}.from_pretrained({str(model.folder)!r})"
