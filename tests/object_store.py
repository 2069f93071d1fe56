"""A local S3 server (moto) for tests, with faults on demand.

Run as a program, this file is the server. It is a separate process, because pyarrow sends requests while it holds the
GIL of the tests' process.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
DENIED = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"


@dataclass(frozen=True)
class Store:
    """One bucket of the server, new and empty."""

    url: str
    bucket: str

    @property
    def root(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def options(self) -> str:
        """Options of an address that name this server."""
        return f"?endpoint_override={self.url.removeprefix('http://')}&scheme=http"

    def ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        headers = {"Authorization": SIGNED, "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            content: bytes = response.read()
        return content

    def put(self, name: str, data: bytes = b"") -> None:
        self.ask("PUT", f"{self.bucket}/{urllib.parse.quote(name)}", data)

    def put_all(self, folder: Path, under: str) -> str:
        """Upload the files of a folder, and return its address."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{under}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.root}/{under}"

    def get(self, name: str) -> bytes:
        return self.ask("GET", f"{self.bucket}/{name}")

    def delete(self, name: str) -> None:
        self.ask("DELETE", f"{self.bucket}/{name}")

    def keys(self) -> set[str]:
        """Return the names of the objects, without the empty ones that stand for folders."""
        listed = self.ask("GET", f"{self.bucket}?list-type=2&encoding-type=url").decode()
        return {urllib.parse.unquote(key) for key in re.findall("<Key>(.*?)</Key>", listed) if not key.endswith("/")}

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """Apply one of FAULTS for the duration of the context."""
        self.ask("PUT", f"_fault/{name}")
        try:
            yield
        finally:
            self.ask("PUT", "_fault/none")

    def gets(self) -> list[str]:
        """Return the paths of all objects that were read so far."""
        return self.ask("GET", "_gets").decode().split()


@contextmanager
def serving() -> Iterator[str]:
    """Run a server and yield its URL. It refuses every request below URL/nowhere."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def new_store(url: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Store:
    """Make a bucket, and set the environment of this process to the server and to the cache."""
    import engine.storage.address

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("EXPERT_MERGING_CACHE", str(cache))
    engine.storage.address._file_system.cache_clear()
    store = Store(url, f"bucket-{uuid.uuid4().hex}")
    store.ask("PUT", store.bucket)
    return store


ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
# From a request's method, query and signature: True to refuse the request, or the seconds to delay it.
FAULTS: dict[str, Callable[[str, str, str], bool | float]] = {
    "none": lambda method, query, signed: 0.0,
    "refuse-all": lambda method, query, signed: True,
    "refuse-writes": lambda method, query, signed: method in ("PUT", "POST"),
    "refuse-part-2": lambda method, query, signed: "partNumber=2" in query,
    "refuse-unsigned": lambda method, query, signed: "Credential=key/" not in signed,
    "slow-parts": lambda method, query, signed: 0.5 * ("partNumber=" in query),
}


def main() -> None:
    from moto.server import create_backend_app
    from werkzeug.serving import make_server

    # Without the dispatcher between services, which lists the folders of moto at every request.
    application = create_backend_app("s3")
    fault, gets = FAULTS["none"], []

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        nonlocal fault
        path, method, query = environ["PATH_INFO"], environ["REQUEST_METHOD"], environ["QUERY_STRING"]
        if path.startswith("/_"):
            if path.startswith("/_fault/"):
                fault = FAULTS[path.removeprefix("/_fault/")]
            start("200 OK", [])
            return ["\n".join(gets).encode()]
        if method == "GET" and "list-type" not in query:
            gets.append(path)
        delay = fault(method, query, environ.get("HTTP_AUTHORIZATION", ""))
        if delay is True or path.startswith("/nowhere/"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [DENIED]
        time.sleep(delay)
        return application(environ, start)

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
