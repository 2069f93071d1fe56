"""State files with a checksum: a damaged, truncated or empty one is found before any of it is used.

A sealed file is one line (a mark with the format's version, and the SHA-256 of the rest in hexadecimal), then the
content. The checksum finds damage, not intent: whoever may write the file may also write its checksum. Readers
therefore check the content like any input from outside. A file that is mapped into memory, or that belongs to the
output, is not sealed: its checksum is in a file of its own below DIGESTS.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

from engine.errors import DamagedError
from engine.storage.folder import Folder

MARK = b"expert-merging 1 "
# Bytes before the content: the mark, 64 hexadecimal digits and a newline.
HEAD = len(MARK) + 65
DIGESTS = "digests"
AGAIN = "run the same command: it computes damaged files again where it can; --fresh discards the run's whole state"


def seal(content: bytes) -> bytes:
    """Return the content with its checksum in front."""
    return MARK + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unseal(data: bytes, where: str) -> bytes:
    """Return the content of sealed bytes; `where` names the file in the error.

    Raises:
        DamagedError: the bytes are not those that `seal` returned.
    """
    content = data[HEAD:]
    if data[:HEAD] != seal(content)[:HEAD]:
        refuse(where)
    return content


def refuse(where: str) -> NoReturn:
    """Raise the error for a state file that is not as it was written."""
    raise DamagedError("the file of the run's state is damaged or was not written by a merge", where, do=AGAIN)


def write_sealed(folder: Folder, name: str, content: bytes) -> int:
    """Write a file with its checksum, and return its size in bytes."""
    data = seal(content)
    folder.write(name, data)
    return len(data)


def read_sealed(folder: Folder, name: str) -> bytes:
    """Return the content of a file that `write_sealed` wrote.

    Raises:
        FileNotFoundError: there is no file of that name.
        DamagedError: the file is not as it was written.
    """
    try:
        data = folder.read(name)
    except IsADirectoryError:
        refuse(f"{folder.where}/{name}")
    return unseal(data, f"{folder.where}/{name}")


def digest_name(name: str) -> str:
    """Return the file name of the checksum of the file `name`."""
    return f"{DIGESTS}/{name}"


def keep_digest(state: Folder, name: str, sha256: str) -> None:
    """Store the SHA-256, in hexadecimal, of a complete file that has the name `name` in the state."""
    write_sealed(state, digest_name(name), sha256.encode())


def has_digest(state: Folder, name: str, folder: Folder, file: str) -> bool:
    """Return whether a file of `folder` is the one whose SHA-256 was stored under this name."""
    try:
        return read_sealed(state, digest_name(name)).decode() == folder.digest(file)
    except (FileNotFoundError, DamagedError):
        return False
