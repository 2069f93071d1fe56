"""Vocabularies of different size: rows of embedding and head, and the tokens that they belong to.

The output has the tokens of one model: the base, or the one that `tokenizer_source` names. Tokens that models share
must have the same ids; longer vocabularies are then cut, and shorter ones filled up. Only headers and tokenizer files
are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoints.find import check_folder
from engine.checkpoints.headers import TEXT_SECTIONS, ModelHeader
from engine.checkpoints.structure import Role
from engine.errors import CheckpointError
from engine.untrusted import TOKENIZER_BYTES, check_regular, library_errors_as, shown


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
    return tokens


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


def with_rows_of(base: ModelHeader, donor: ModelHeader, donor_folder: Path) -> ModelHeader:
    """Return the base's header with the donor's number of rows in embedding and head.

    Raises:
        CheckpointError: `check_tokens` finds a difference, or the donor's embedding or head does not fit.
    """
    check_tokens(base, donor, donor_folder, f"the base ({base.folder})")
    tensors = dict(base.tensors)
    for name, tensor in base.tensors.items():
        if has_tokens_for_rows(base, name):
            other = donor.tensors[rows_in(donor, name)].shape
            if other[1:] != tensor.shape[1:]:
                what, expected = f"the tensor {name!r} has shape {other}", f"rows as in the base's {tensor.shape}"
                raise CheckpointError(what, str(donor_folder), expected)
            tensors[name] = replace(tensor, shape=other)
    return replace(base, config=_with_size(base.config, donor.vocab_size), tensors=tensors)


def rows_in(donor: ModelHeader, tensor: str) -> str:
    """Return the donor's name for an embedding or head; its embedding if it has no separate head.

    Raises:
        CheckpointError: the donor has neither.
    """
    names = [tensor, *(name for name in donor.tensors if donor.roles.get(name) is Role.EMBEDDING)]
    donor_name = next((name for name in names if name in donor.tensors), None)
    if donor_name is None:
        what = f"the model has neither {tensor!r} nor an embedding"
        raise CheckpointError(what, str(donor.folder), "a row for each token of `tokenizer_source`")
    return donor_name


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
