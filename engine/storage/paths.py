"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.errors import InputError
from engine.storage.address import Address
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.object_folder import ObjectFolder


def locate(path: str, folder: Path, error_type: type[InputError] = InputError) -> Path:
    """The absolute path that a user means, relative to `folder`; `~` is a home, and `file://` goes before a path.

    Raises:
        InputError: no file can have that name; `error_type` says which of them.
    """
    if is_uri(path):
        raise error_type("an address in object storage cannot stand here", path, "a path")
    try:
        return (folder / as_path(path).expanduser()).resolve()
    except (RuntimeError, ValueError, OSError) as error:
        raise error_type(f"not a path: {error}", repr(path)) from error


def is_uri(text: str) -> bool:
    """Whether this names something in object storage."""
    return text.startswith(("s3://", "gs://"))


def as_path(text: str) -> Path:
    """What a path or a `file://` URI names on this machine."""
    return Path(unquote(urlsplit(text).path) if text.startswith("file://") else text)


def open_folder(where: Path | str) -> Folder:
    """A folder by its path or URI; it need not be there yet."""
    text = str(where)
    return ObjectFolder(str(Address.of(text))) if is_uri(text) else LocalFolder(as_path(text))
