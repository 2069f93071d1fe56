"""Object storage as pyarrow reaches it: addresses, file systems, and errors that say what to do about them.

An address is `s3://bucket/path` or `gs://bucket/path`. Credentials come from where the storage's own tools take them:
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, the machine's role; GOOGLE_APPLICATION_CREDENTIALS. They are never
part of an address, for addresses are recorded. Another endpoint comes from AWS_ENDPOINT_URL, or stands in the address
with pyarrow's other options: `s3://bucket/path?endpoint_override=HOST:PORT&scheme=http`. Knows no folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from engine.errors import InputError, MergeError, StorageError

# The default of pyarrow's own, for gs, is a quarter of an hour; for s3 it is six seconds.
RETRY = "retry_limit_seconds=20"


ADVICE = {
    "s3": "check the address, the endpoint (AWS_ENDPOINT_URL) and the credentials (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, ~/.aws, or the machine's role)",
    "gs": "check the address and the credentials (GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account)",
}


@dataclass(frozen=True)
class Address:
    """A URI in its parts: `place` is the bucket, perhaps with a user before it; `options` what follows the `?`."""

    scheme: str
    place: str
    path: str
    options: str

    @classmethod
    def of(cls, uri: str, error_type: type[InputError] = InputError) -> Address:
        """The parts of a URI.

        Raises:
            InputError: it has no bucket, or a secret; `error_type` says which error.
        """
        scheme, _, rest = uri.partition("://")
        place, _, options = rest.partition("?")
        place, _, path = place.partition("/")
        user, _, bucket = place.rpartition("@")
        if ":" in user:
            raise error_type(
                "a secret in the address would be recorded with it", f"{scheme}://…@{bucket}", do=ADVICE[scheme]
            )
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", bucket, flags=re.ASCII):
            raise error_type("the address names no bucket", uri, f"{scheme}://bucket/path")
        return cls(scheme, place, path.strip("/"), options)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}/{self.path}".rstrip("/") + (f"?{self.options}" if self.options else "")

    def __truediv__(self, name: str) -> Address:
        return replace(self, path=f"{self.path}/{name}".strip("/"))

    @property
    def key(self) -> str:
        """Bucket and path, as the file system takes them."""
        return f"{self.place.rpartition('@')[2]}/{self.path}".rstrip("/")

    @property
    def local(self) -> PurePosixPath:
        """Where a copy belongs in a cache. What has other options may be of another endpoint, and so another thing."""
        bucket, _, path = self.key.partition("/")
        return PurePosixPath(
            self.scheme, bucket + (f"?{quote(self.options, safe='=&:')}" if self.options else ""), path
        )

    @contextmanager
    def connection(self, error_type: type[MergeError] = StorageError) -> Iterator[Any]:
        """The file system, while the storage is asked for this; what it refuses is told as a `error_type`.

        Raises:
            FileNotFoundError: as it comes.
        """
        try:
            yield _file_system(self.scheme, self.place, self.options)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            # Without the numbers of the request, and what a library adds for its own developers.
            said = re.split(r" \(Request ID| error_info=|\n", str(error))[0]
            again = " and run the same command: it goes on from here" if error_type is StorageError else ""
            raise error_type(f"the storage refuses: {said}", str(self), do=ADVICE[self.scheme] + again) from error


@cache
def _file_system(scheme: str, place: str, options: str) -> Any:
    # Kept: the first one of a bucket asks the storage for its region.
    from pyarrow.fs import FileSystem

    if scheme == "gs" and "retry_limit_seconds" not in options:
        options = f"{options}&{RETRY}".lstrip("&")
    return FileSystem.from_uri(f"{scheme}://{place}/?{options}")[0]
