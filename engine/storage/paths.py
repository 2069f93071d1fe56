"""Paths and URIs: how a user's text becomes a path, and the folder behind a path or URI (`file://` is a path)."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.errors import InputError
from engine.storage.address import Address, check_no_secret
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.object_folder import ObjectFolder


def locate(path: str, folder: Path, error_type: type[InputError] = InputError) -> Path:
    """Return the absolute path of a text that a user wrote: relative to `folder`, with `~` and `file://` expanded.

    Raises:
        InputError: (`error_type`) the text is an address in object storage, or no file can have that name.
    """
    if is_uri(path):
        check_no_secret(path, error_type)
        raise error_type("an address in object storage is not accepted here", path, "a path")
    try:
        return (folder / as_path(path).expanduser()).resolve()
    except (RuntimeError, ValueError, OSError) as error:
        raise error_type(f"not a path: {error}", repr(path)) from error


def is_uri(text: str) -> bool:
    """Return whether this is an address in object storage (`s3://` or `gs://`)."""
    return text.startswith(("s3://", "gs://"))


def as_path(text: str) -> Path:
    """Return the path that a text names, without the `file://` it may begin with."""
    return Path(unquote(urlsplit(text).path) if text.startswith("file://") else text)


def open_folder(where: Path | str) -> Folder:
    """Return the folder of a path or URI. It need not exist yet."""
    text = str(where)
    return ObjectFolder(str(Address.of(text))) if is_uri(text) else LocalFolder(as_path(text))
