"""A lock in object storage, which has none: an object that its holder writes anew every few seconds.

Whoever wants the folder watches the object by its own clock, for no two machines' clocks agree: while it changes, its
holder is alive. Knows a folder to read and write, and nothing of what it is for.
"""

from __future__ import annotations

import time
from threading import Event, Thread
from typing import TYPE_CHECKING
from uuid import uuid4

from engine.errors import StorageError
from engine.storage.folder import LOCK

if TYPE_CHECKING:
    from engine.storage.folder import Folder


# Seconds between two renewals; after how many that did not come a lease is free to take; and how long a writer waits
# to see whether another wrote at the same moment.
RENEWAL = 5.0


PATIENCE = 6


SETTLING = 2.0


class Lease:
    """The lease of a folder. A holder that was away too long (stopped, or cut off) may have lost it: see `held`."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._owner = folder, uuid4().hex
        self._ended = Event()
        self._thread = Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> bool:
        """Take the lease and keep it until `end`; one that nobody renews is taken over. False: somebody renews it.

        Raises:
            StorageError: the storage refuses.
        """
        seen, began = self._read(), time.monotonic()
        while seen is not None and time.monotonic() < began + PATIENCE * RENEWAL:
            time.sleep(RENEWAL / 2)
            now = self._read()
            if now not in (seen, None):
                return False
            seen = now
        self._write()
        time.sleep(SETTLING)
        if not self._is_mine():
            return False
        self._thread.start()
        return True

    def held(self) -> None:
        """Make sure that the lease is still this one's.

        Raises:
            StorageError: it is not.
        """
        if not self._is_mine():
            raise StorageError(
                "another run has taken over: this one was not heard of for too long",
                self._folder.where,
                do="let that run come to its end",
            )

    def end(self) -> bool:
        """Stop renewing; whether the lease was still this one's, and so is its holder's to remove."""
        self._ended.set()
        self._thread.join()
        return self._is_mine()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            try:
                if not self._is_mine():
                    return
                self._write()
            except StorageError:
                # Tried again at the next turn. Whether it was too late is what `held` finds out.
                continue

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and found.startswith(self._owner.encode())

    def _read(self) -> bytes | None:
        try:
            return self._folder.read(LOCK)
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        # Never twice the same, so that whoever watches sees it change.
        self._folder.write(LOCK, f"{self._owner} {uuid4().hex}".encode())
