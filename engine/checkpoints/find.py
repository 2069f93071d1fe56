"""Locating model folders: by path, URI or hub id, with checks of the files in them."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError, InputError
from engine.machine import check_home
from engine.storage.cache import fetch
from engine.storage.paths import is_uri, locate
from engine.untrusted import check_regular

# The folder for `find_model` of a plan's models, which are absolute paths, hub ids or URIs: no folder shadows a hub id.
ROOT = Path("/")

# Files of a hub repository that are downloaded: weights, tokenizer, config, and the code that runs if
# `trust_remote_code` allows it; never pickled weights.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]

# Files among these that are not downloaded: checkpoints and state of a training, and other formats of the weights.
LEFTOVERS = [
    "checkpoint-*/*", "global_step*/*", "runs/*", "wandb/*", "original/*", "consolidated*", "optimizer*",
    "trainer_state.json", "training_args*",
]  # fmt: skip

# The card of a model, which tells its license.
CARD = "README.md"

# Files that are copied to the output: tokenizer files by the names of transformers' tokenizers, then all others. A
# fixed list of patterns, so that no other file of a model's folder reaches the output.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tokenizer.model.v[0-9]", "vocab.json", "vocab.txt", "vocab.bpe", "encoder.json", "emoji.json", "merges.txt",
    "bpe.codes", "byte_maps.json", "dict.txt", "spiece.model", "spm.model", "sentencepiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "target_vocab.json", "normalizer.json", "tekken.json",
    "tiktoken.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
COMPANIONS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md",
)  # fmt: skip
# Files that decide what a model computes, besides its weights.
DECIDING = (
    "config.json", "adapter_config.json", "delta_config.json", "generation_config.json", "model.safetensors.index.json",
)  # fmt: skip
# A folder in a model's folder, whose files transformers reads with the tokenizer.
TEMPLATES = "additional_chat_templates"


class ModelName(NamedTuple):
    """A checkpoint by path, URI or hub id, and the adapter on top of it, if there is one."""

    checkpoint: str
    adapter: str | None = None


def split_adapter(model: str, folder: Path) -> ModelName:
    """Split mergekit's model+lora, unless the + is part of a folder's name. Paths are relative to `folder`."""
    if is_uri(model):
        # A + is part of the name, unless a URI follows.
        parts = re.split(r"\+(?=[a-z0-9]+://)", model, maxsplit=1)
        return ModelName(*parts)
    if "+" not in model or os.path.isdir(locate(model, folder, CheckpointError)):  # noqa: PTH112
        return ModelName(model)
    # The first + that follows a folder: a path may contain others.
    ends = [plus.start() for plus in re.finditer(r"\+", model)]
    found = (end for end in ends if os.path.isdir(locate(model[:end], folder, CheckpointError)))  # noqa: PTH112
    end = next(found, ends[0])
    return ModelName(model[:end], model[end + 1 :])


def find_model(model: str, config_folder: Path) -> Path:
    """Return the folder of a model on this machine.

    Object storage is copied into the cache of `engine.storage.cache`; a hub repository is downloaded into the cache of
    huggingface_hub (with HF_HUB_OFFLINE=1, it must be there already).

    Args:
        model: A path relative to `config_folder`, a URI (s3://, gs://, file://), or a hub id (`owner/name`, optionally
            with `@revision`).
        config_folder: The folder of the config.

    Raises:
        CheckpointError: there is no such folder, or the storage or the hub cannot provide it.
    """
    if is_uri(model):
        return fetch(model, [*HUB_FILES, CARD], CheckpointError, LEFTOVERS)
    path = locate(model, config_folder, CheckpointError)
    if os.path.isdir(path):  # noqa: PTH112 - returns False, not an error, for impossible names
        return path
    hub_id, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", hub_id, flags=re.ASCII):
        raise CheckpointError("no such model folder", str(path), "a folder with config.json, or a hub id: owner/name")

    check_home(CheckpointError, "HF_HOME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        found = snapshot_download(
            hub_id, revision=revision or None, allow_patterns=[*patterns], ignore_patterns=LEFTOVERS
        )
        return Path(found)

    try:
        try:
            return download(*HUB_FILES, CARD)
        except LocalEntryNotFoundError:
            # The hub is out of reach, and a copy that was made without the card is enough.
            return download(*HUB_FILES)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"no folder of this name, and the hub cannot provide it: {str(error).splitlines()[0]}",
            model,
            do=f"check the path ({path}) or the hub id; with HF_HUB_OFFLINE=1, the model must already be in the cache",
        ) from error


def check_folder(folder: Path) -> None:
    """Check the files of a model folder that are read or copied, before any is opened.

    Raises:
        CheckpointError: the folder cannot be read, or a file is not regular or is a link out of the folder. A snapshot
            in the hub's cache may link to the blobs of its repository.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error.strerror}", str(folder)) from error
    for path in paths:
        if any(fnmatchcase(path.name, pattern) for pattern in (*HUB_FILES, *TOKENIZER_FILES, "LICENSE*")):
            check_file(path, folder)
        elif path.name == TEMPLATES:
            check_inside(path, folder)
            for template in sorted(path.iterdir()) if path.is_dir() else ():
                check_file(template, folder)


def deciding_files(folder: Path, copied: bool, remote_code: bool) -> list[str]:
    """Return the names of the files besides the weights that decide the result of a merge, sorted.

    Args:
        folder: The folder of a model.
        copied: The output gets this model's tokenizer or companions, from which the samples are made, too.
        remote_code: The model's code may run.
    """
    names = {*DECIDING, *((*tokenizer_files(folder), *COMPANIONS) if copied else ())}
    names |= {path.name for path in folder.glob("*.py")} if copied and remote_code else set()
    return sorted(name for name in names if (folder / name).is_file())


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of a folder's tokenizer files, sorted, and of the chat templates in a folder below it."""
    names = {path.name for path in folder.iterdir()}
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)]
    if TEMPLATES in names and (folder / TEMPLATES).is_dir():
        found += [f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")]
    return sorted(found)


def is_chat_template(name: str) -> bool:
    """Return whether a name of `tokenizer_files` is that of a chat template."""
    return name.startswith((f"{TEMPLATES}/", "chat_template."))


def check_file(path: Path, folder: Path) -> None:
    """Check one file of a model folder; see `check_folder`.

    Raises:
        CheckpointError: the file is not regular, or is a link out of the folder.
    """
    check_inside(path, folder)
    check_regular(path, None, CheckpointError)


def check_inside(path: Path, folder: Path, error_type: type[InputError] = CheckpointError) -> None:
    """Check that a file or folder of a model folder is not a link out of it; see `check_folder`.

    Raises:
        InputError: (`error_type`) it is a link out of the folder.
    """
    allowed = [Path(os.path.realpath(folder))]
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise error_type(
            f"the file is a link out of the model's folder, to {target}", str(path), do="replace the link by the file"
        )


def portable(model: str, folder: Path, config_folder: Path) -> str:
    """Return a name under which another node finds the same files.

    For a path this is the absolute path; for a URI, the URI; for a hub id, the id with the commit of the cached
    snapshot.
    """
    if is_uri(model):
        return model
    if folder == locate(model, config_folder):
        return str(folder)
    return f"{model.partition('@')[0]}@{folder.name}"
