"""Addresses in object storage, their pyarrow file systems, and errors with advice.

An address is `s3://bucket/path` or `gs://bucket/path`. Credentials are looked up where the storage's own tools look:
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, the machine's role; GOOGLE_APPLICATION_CREDENTIALS. They are never
part of an address, because addresses are recorded. Another endpoint is given by AWS_ENDPOINT_URL, or in the address
with pyarrow's other options: `s3://bucket/path?endpoint_override=HOST:PORT&scheme=http`.
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

# pyarrow's default for gs is 15 minutes; for s3 it is 6 seconds.
RETRY = "retry_limit_seconds=20"

ADVICE = {
    "s3": "check the address, the endpoint (AWS_ENDPOINT_URL) and the credentials (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, ~/.aws, or the machine's role)",
    "gs": "check the address and the credentials (GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account)",
}


@dataclass(frozen=True)
class Address:
    """The parts of a URI: `place` is the bucket, optionally as `user@bucket`; `options` is the part after the `?`."""

    scheme: str
    place: str
    path: str
    options: str

    @classmethod
    def of(cls, uri: str, error_type: type[InputError] = InputError) -> Address:
        """Return the parts of a URI.

        Raises:
            InputError: (`error_type`) the URI has no valid bucket, or contains a secret.
        """
        scheme, _, rest = uri.partition("://")
        place, _, options = rest.partition("?")
        place, _, path = place.partition("/")
        user, _, bucket = place.rpartition("@")
        if ":" in user:
            raise error_type(
                "the address contains a secret, and addresses are recorded", f"{scheme}://…@{bucket}", do=ADVICE[scheme]
            )
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", bucket, flags=re.ASCII):
            raise error_type("the address has no valid bucket name", uri, f"{scheme}://bucket/path")
        return cls(scheme, place, path.strip("/"), options)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}/{self.path}".rstrip("/") + (f"?{self.options}" if self.options else "")

    def __truediv__(self, name: str) -> Address:
        return replace(self, path=f"{self.path}/{name}".strip("/"))

    @property
    def key(self) -> str:
        """Bucket and path, in the form that pyarrow's file system expects."""
        return f"{self.place.rpartition('@')[2]}/{self.path}".rstrip("/")

    @property
    def local(self) -> PurePosixPath:
        """Relative path of a copy in a cache. It includes the options, which may name another endpoint."""
        bucket, _, path = self.key.partition("/")
        return PurePosixPath(
            self.scheme, bucket + (f"?{quote(self.options, safe='=&:')}" if self.options else ""), path
        )

    @contextmanager
    def connection(self, error_type: type[MergeError] = StorageError) -> Iterator[Any]:
        """Yield the file system for requests about this address, and convert their failures to `error_type`.

        Raises:
            MergeError: (`error_type`) a request failed.
            FileNotFoundError: the storage has no such object; raised as it is.
        """
        try:
            yield _file_system(self.scheme, self.place, self.options)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            # Without request ids and the SDK's debugging details.
            reason = re.split(r" \(Request ID| error_info=|\n", str(error))[0]
            resume = ", then run the same command to resume" if error_type is StorageError else ""
            raise error_type(
                f"the storage request failed: {reason}", str(self), do=ADVICE[self.scheme] + resume
            ) from error


@cache
def _file_system(scheme: str, place: str, options: str) -> Any:
    # Cached: for the first file system of a bucket, pyarrow asks the storage for the region.
    from pyarrow.fs import FileSystem

    if scheme == "gs" and "retry_limit_seconds" not in options:
        options = f"{options}&{RETRY}".lstrip("&")
    return FileSystem.from_uri(f"{scheme}://{place}/?{options}")[0]
