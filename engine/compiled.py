"""Functions compiled by numba, and the folder in which this user's machine code is kept from one run to the next.

Compiling the kernels of a merge takes one to five seconds in each process. Numba's own cache is used, with two
differences. A change in any source file beside a kernel's makes its machine code invalid, since a kernel may call
functions of other modules; and nothing that is wrong with the cache ends a merge.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import filelock
import numba
from numba.core import caching

from engine.errors import MergeError
from engine.storage.cache import cache_folder

# Functions without a cache so far.
_waiting: list[Any] = []


def compiled(function: Callable[..., None]) -> Any:
    """Return a function that numba compiles for each combination of argument types, and that releases the GIL."""
    made = numba.njit(function, nogil=True)
    _waiting.append(made)
    return made


def keep_compiled() -> None:
    """Use the machine code that earlier runs have kept in `kernels` of the cache, and keep what this one compiles.

    Nothing is kept, and nothing read, where that folder cannot be made or another user can write to it: machine code is
    run as it is.
    """
    folder = _own_folder()
    while _waiting:
        function = _waiting.pop()
        if folder is not None and hasattr(function, "enable_caching"):  # not with NUMBA_DISABLE_JIT
            function._cache = _Kept(function.py_func)


@cache
def _own_folder() -> Path | None:
    """Return the folder for machine code, or None if there is none that only this user can write to."""
    with suppress(OSError, MergeError):
        folder = cache_folder() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The group of the parent may be the user's own, as on Debian.
        found = ((folder.lstat(), 0o022), (folder.parent.lstat(), 0o002))
        if all(status.st_uid == os.geteuid() and not status.st_mode & others for status, others in found):
            return folder
    return None


@cache
def _fingerprint(folder: str) -> str:
    """Return a digest of all sources in a folder, on which the machine code of their functions depends."""
    sources = sorted(Path(folder).glob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """The place of a function's machine code: a folder for each state of the sources, wherever these are."""

    def __init__(self, function: Any) -> None:
        code = function.__code__
        self._line, self._stamp = code.co_firstlineno, _fingerprint(str(Path(code.co_filename).parent))

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        """See numba."""
        return cls(py_func)

    def get_cache_path(self) -> str:
        """See numba."""
        return str(_own_folder() / self._stamp)  # type: ignore[operator]  # `keep_compiled` has checked it

    def get_source_stamp(self) -> str:
        """See numba."""
        return self._stamp

    def get_disambiguator(self) -> str:
        """See numba."""
        return str(self._line)


class _Files(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Kept(caching.FunctionCache):  # type: ignore[misc]
    """Numba's cache of a function, without whose files the function is compiled."""

    _impl_class = _Files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the machine code for a signature; None if there is none, or if it is damaged."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # noqa: BLE001 - whatever unpickling a damaged file raises
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the machine code for a signature, if possible."""
        # Numba reads the index, changes it and writes it: of two processes, one could name the other's file.
        with suppress(OSError), filelock.FileLock(f"{self.cache_path}.lock"):
            super().save_overload(sig, data)
