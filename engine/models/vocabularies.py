"""Vocabularies of tokenizers, and new tokenizers made of several by mergekit, in child processes with limits.

mergekit decides which tokens a new tokenizer has, and its library makes the files; nothing of it is imported here.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from engine.bounded_process import MEMORY, SECONDS, bounded
from engine.checkpoints.find import is_chat_template, tokenizer_files
from engine.checkpoints.vocabulary import tokens_of
from engine.errors import CheckpointError
from engine.untrusted import TOKENIZER_BYTES, check_regular, library_errors_as

# Files without tokens, which a folder may have without a tokenizer.
_SETTINGS = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}

Tokens = dict[str, int]


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a merge.

    Attributes:
        base: The folder of the base.
        models: The folders of all models, the base's included.
        source: The folder of the model that has the output's tokenizer; None for a union.
        add: Tokens that the output has in any case.
        remote_code: Whether code of a tokenizer's folder may run.
    """

    base: Path
    models: tuple[Path, ...]
    source: Path | None
    add: tuple[str, ...] = ()
    remote_code: bool = False


@dataclass(frozen=True)
class Vocabularies:
    """The tokens of the output, those of each folder with a tokenizer, and the files of the output's if it is new."""

    output: Tokens
    models: dict[Path, Tokens]
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the files, in hexadecimal; "" without files."""
        sha256 = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            sha256.update(f"{name}\0{len(content)}\0".encode() + content)
        return sha256.hexdigest() if self.files else ""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the file of a tokenizer's tokens."""
    return any(name not in _SETTINGS and not is_chat_template(name) for name in tokenizer_files(folder))


def are_alike(folders: Iterable[Path]) -> bool:
    """Return whether the tokenizers of these folders are the same file, byte by byte."""
    files = [folder / "tokenizer.json" for folder in folders if has_tokenizer(folder)]
    return all(file.is_file() and filecmp.cmp(files[0], file, shallow=False) for file in files)


def plain_vocabularies(asked: Tokenizers) -> Vocabularies | None:
    """Return the vocabularies if the output's tokenizer is that of a model as it is; None if it has to be made.

    Raises:
        CheckpointError: See `tokens_of`.
    """
    if asked.source is None:
        return None
    tokens = {folder: tokens_of(folder) for folder in dict.fromkeys((asked.source, *asked.models))}
    output = tokens[asked.source]
    found = {folder: of_folder for folder, of_folder in tokens.items() if of_folder is not None}
    lacks_one = any(folder not in found and has_tokenizer(folder) for folder in tokens)
    if output is None or lacks_one or not output.keys() >= set(asked.add):
        return None
    return Vocabularies(output, found)


def made_vocabularies(asked: Tokenizers) -> Vocabularies:
    """Return the vocabularies and the new tokenizer that mergekit makes. Kept, as long as no file changes.

    Raises:
        CheckpointError: A tokenizer cannot be read within the limits of a child process, or mergekit refuses it.
    """
    folders = [folder for folder in dict.fromkeys((asked.base, *asked.models, asked.source)) if folder is not None]
    for folder in folders:
        tokens_of(folder)  # checks the folder, and what mergekit would take for a model without a tokenizer
    files = [folder / name for folder in folders for name in (*tokenizer_files(folder), "config.json")]
    for file in files:
        if file.exists():
            check_regular(file, TOKENIZER_BYTES, CheckpointError)
    stats = [file.stat() for file in files if file.exists()]
    return _made(asked, tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=2)
def _made(asked: Tokenizers, stamps: tuple[Any, ...]) -> Vocabularies:
    """Make the tokenizer. `stamps` of the files decide whether a kept one is still right."""
    models = [folder for folder in asked.models if has_tokenizer(folder)]
    at, count = str(asked.base), len(models) + 1
    seconds, memory = SECONDS * count, MEMORY + (count << 29)
    limits = f"at most {seconds} CPU seconds and {memory / 2**30:g} GiB of memory for {count} tokenizers"

    def beyond(fails: str) -> CheckpointError:
        do = "replace the tokenizer of one of the models, or set `tokenizer_source: base`"
        return CheckpointError(f"making a tokenizer of those of all models {fails}", at, limits, do)

    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        output, of_models = bounded(lambda: _by_mergekit(asked, models, work), beyond, seconds, memory)
        out = work / "tokenizer"
        files = {name: (out / name).read_bytes() for name in tokenizer_files(out)}
    known = {folder: tokens for folder, tokens in zip(models, of_models, strict=True) if tokens is not None}
    return Vocabularies(output, known, files)


def _by_mergekit(asked: Tokenizers, models: Sequence[Path], work: Path) -> tuple[Tokens, list[Tokens | None]]:
    """Make the tokenizer in a folder below `work`, and return the tokens of it and of each model. Runs in a child.

    A model of which transformers cannot load the tokenizer has None.
    """
    # The parent removes what is left here if the child ends.
    tempfile.tempdir = str(work)
    os.environ.update(HF_HUB_OFFLINE="1")
    with library_errors_as(
        lambda message: CheckpointError(
            f"mergekit cannot make a tokenizer of those of the models: {message}", str(asked.base)
        )
    ):
        import huggingface_hub.constants
        from mergekit.common import ModelPath, ModelReference
        from mergekit.tokenizer.build import build_tokenizer

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        _order_tokens()

        def reference(folder: Path) -> Any:
            return ModelReference(model=ModelPath(path=str(folder)))

        source = "union" if asked.source is None else "base" if asked.source == asked.base else reference(asked.source)
        info = build_tokenizer(
            base_model=reference(asked.base),
            referenced_models=[reference(folder) for folder in models],
            tokenizer_source=source,
            trust_remote_code=asked.remote_code,
            add_tokens=list(asked.add),
        )
        info.tokenizer.save_pretrained(work / "tokenizer")
        of_models = [info.original_vocabs.get(reference(folder)) for folder in models]
        return info.tokenizer.get_vocab(), of_models


def _order_tokens() -> None:
    """Make the tokenizers of this process list their tokens by id.

    Their library has another order each time, in which mergekit would number the tokens that are new in a union.
    """
    from transformers import PreTrainedTokenizerFast

    unordered = PreTrainedTokenizerFast.get_vocab

    def get_vocab(tokenizer: Any) -> Tokens:
        return dict(sorted(unordered(tokenizer).items(), key=itemgetter(1)))

    PreTrainedTokenizerFast.get_vocab = get_vocab
