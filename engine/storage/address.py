"""Addresses in object storage, their pyarrow file systems, and errors with advice.

An address is `s3://bucket/path` or `gs://bucket/path`. Credentials are looked up where the storage's own tools look:
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, the machine's role; GOOGLE_APPLICATION_CREDENTIALS. They are never
part of an address, because addresses are recorded. Another endpoint is given by AWS_ENDPOINT_URL, or in the address
with the other options in OPTIONS: `s3://bucket/path?endpoint_override=HOST:PORT&scheme=http`.
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
from engine.storage.folder import AGAIN

# pyarrow's default for gs is 15 minutes; for s3 it is 6 seconds.
RETRY = "retry_limit_seconds=20"

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}
ADVICE = {
    "s3": f"check the address, the endpoint (AWS_ENDPOINT_URL) and the credentials ({CREDENTIALS['s3']})",
    "gs": f"check the address and the credentials ({CREDENTIALS['gs']})",
}
# The options that pyarrow takes, none of which is a secret.
OPTIONS = {
    "s3": {
        "allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open", "endpoint_override", "region", "scheme",
        "smart_defaults", "tls_ca_dir_path", "tls_ca_file_path", "tls_verify_certificates",
    },
    "gs": {"endpoint_override", "project_id", "retry_limit_seconds", "scheme"},
}  # fmt: skip


@dataclass(frozen=True)
class Address:
    """The parts of a URI: `place` is the bucket, in gs also `anonymous@bucket`; `options` is the part after the `?`."""

    scheme: str
    place: str
    path: str
    options: str

    @classmethod
    def of(cls, uri: str, error_type: type[InputError] = InputError) -> Address:
        """Return the parts of a URI.

        Raises:
            InputError: (`error_type`) the URI has no valid bucket, or contains a secret or an unknown option.
        """
        check_no_secret(uri, error_type)
        scheme, _, rest = uri.partition("://")
        place, _, options = rest.partition("?")
        place, _, path = place.partition("/")
        bucket = place.rpartition("@")[2]
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
            resume = f", {AGAIN}" if error_type is StorageError else ""
            raise error_type(
                f"the storage request failed: {reason}", str(self), do=ADVICE[self.scheme] + resume
            ) from error


def check_no_secret(uri: str, error_type: type[InputError], where: str = "") -> None:
    """Check that a URI contains no credentials and no unknown option. The error does not repeat what may be a secret.

    Args:
        uri: The URI.
        error_type: The class of the error to raise.
        where: The place of the URI for the message; by default its scheme.

    Raises:
        InputError: (`error_type`) it contains credentials or an unknown option.
    """
    scheme, _, rest = uri.partition("://")
    place, _, options = rest.partition("?")
    bucket, known = place.partition("/")[0], OPTIONS[scheme]
    # A secret may contain a slash, so that its `@` is not in the first part.
    if ":" in bucket or ("@" in bucket and (scheme, bucket.partition("@")[0]) != ("gs", "anonymous")):
        what = "the address contains credentials or a port, and addresses are recorded"
    elif "@" in options or {option.partition("=")[0] for option in options.split("&") if option} - known:
        what = "the address contains a secret or an unknown option, and addresses are recorded"
    else:
        return
    expected = f"{scheme}://bucket/path, with no options after a `?` but {', '.join(sorted(known))}"
    do = f"give credentials by {CREDENTIALS[scheme]}; a host and a port by ?endpoint_override=HOST:PORT"
    raise error_type(what, where or f"{scheme}://…", expected, do)


def addresses_in(value: Any, location: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Yield every URI in a value of lists and mappings with its location, also the second URI of `model+adapter`."""
    if isinstance(value, str):
        for uri in re.findall(r"(?:s3|gs)://.*?(?=\+?(?:s3|gs)://|$)", value, re.DOTALL):
            yield location, uri
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from addresses_in(inner, (*location, key))


@cache
def _file_system(scheme: str, place: str, options: str) -> Any:
    # Cached: for the first file system of a bucket, pyarrow asks the storage for the region.
    from pyarrow.fs import FileSystem

    if scheme == "gs" and "retry_limit_seconds" not in options:
        options = f"{options}&{RETRY}".lstrip("&")
    return FileSystem.from_uri(f"{scheme}://{place}/?{options}")[0]
