"""A part of the house that has no words of its own yet."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from engine.errors import CheckpointError
from engine.storage.cache import fetch
from engine.storage.paths import is_uri, locate
from engine.untrusted import check_regular

# What a model in a plan is looked for from: it is an absolute path, a hub id or a URI, and no folder shadows those.
ROOT = Path("/")


# What a run takes of a hub repository: weights, tokenizer, configuration, and the code that `trust_remote_code` may
# have it run; never pickled weights.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def find_model(model: str, config_folder: Path) -> Path:
    """The folder of a model: a path relative to the config's folder, a URI (s3://, gs://, file://), or a hub id
    (`owner/name`, perhaps `@revision`).

    What a URI names is fetched into a cache on this machine. A hub id is fetched into huggingface_hub's;
    HF_HUB_OFFLINE=1 takes what that holds.

    Raises:
        CheckpointError: there is no such folder, or the storage or the hub does not give it.
    """
    if is_uri(model):
        return fetch(model, HUB_FILES, CheckpointError)
    path = locate(model, config_folder, CheckpointError)
    if os.path.isdir(path):  # noqa: PTH112 - false, not an error, for a name that no file can have
        return path
    hub_id, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", hub_id, flags=re.ASCII):
        raise CheckpointError("no such model folder", str(path), "a folder with config.json, or a hub id: owner/name")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"no folder of this name, and the hub does not give it: {str(error).splitlines()[0]}",
            model,
            do=f"check the path ({path}) or the id; with HF_HUB_OFFLINE=1 the model must be in the cache already",
        ) from error


def check_folder(folder: Path) -> None:
    """Look at the files of a model's folder that are read or copied, before anybody opens them.

    Raises:
        CheckpointError: one is no regular file, or a link out of the folder; a snapshot in the hub's cache may link to
        the blobs of its repository.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error.strerror}", str(folder)) from error
    for path in found:
        if any(fnmatchcase(path.name, pattern) for pattern in (*HUB_FILES, "LICENSE*")):
            check_file(path, folder)


def check_file(path: Path, folder: Path) -> None:
    """See `check_folder`, of one file of it."""
    inside = [Path(os.path.realpath(folder))]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(one) for one in inside):
        raise CheckpointError(
            f"a link out of the model's folder, to {target}", str(path), do="put the file itself there"
        )
    check_regular(path, None, CheckpointError)


def portable(model: str, folder: Path, config_folder: Path) -> str:
    """How another node finds the same files: a path or a URI as it is, a hub id with the commit that names its cache
    folder.
    """
    if is_uri(model):
        return model
    if folder == locate(model, config_folder):
        return str(folder)
    return f"{model.partition('@')[0]}@{folder.name}"
