"""A lock for folders in object storage: an object that its holder rewrites every few seconds.

Object storage offers no locks. A process that wants the folder watches the object: while it changes, its holder is
alive. The watcher measures time by its own clock alone, because the clocks of two machines differ.
"""

from __future__ import annotations

import time
from threading import Event, Thread
from uuid import uuid4

from engine.errors import StorageError
from engine.storage.folder import LOCK, Folder

# Seconds between two renewals.
RENEWAL = 5.0
# Number of missed renewals after which a lease may be taken over.
PATIENCE = 6
# Seconds between the first write and the check that no other process wrote at the same moment.
SETTLING = 2.0


class Lease:
    """The lease of a folder. A holder that was stopped or cut off for too long may have lost it: see `held`."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._owner = folder, uuid4().hex
        self._ended = Event()
        self._thread = Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> bool:
        """Take the lease and renew it until `end` is called. A lease that is not being renewed is taken over.

        Returns:
            False if another process renews the lease.

        Raises:
            StorageError: a storage request failed.
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
        if not self._is_held():
            return False
        self._thread.start()
        return True

    def held(self) -> None:
        """Check that this process still holds the lease.

        Raises:
            StorageError: another process has taken it over, or a storage request failed.
        """
        if not self._is_held():
            raise StorageError(
                "another run has taken over this folder, because this run did not renew its lock in time",
                self._folder.where,
                do="wait until that run ends",
            )

    def end(self) -> bool:
        """Stop renewing, and return whether this process still held the lease and may remove its object."""
        self._ended.set()
        self._thread.join()
        return self._is_held()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            try:
                if not self._is_held():
                    return
                self._write()
            except StorageError:
                # Retried after the next interval. If that is too late, `held` reports it.
                continue

    def _is_held(self) -> bool:
        content = self._read()
        return content is not None and content.startswith(self._owner.encode())

    def _read(self) -> bytes | None:
        try:
            return self._folder.read(LOCK)
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        # Each write has new content, so that watchers see a change.
        self._folder.write(LOCK, f"{self._owner} {uuid4().hex}".encode())
