"""A stand-in for the hub of Hugging Face on this machine: repositories of models, without a history."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN, READER = "hf_writer", "hf_reader"


@dataclass
class Hub:
    """The content of the hub: files by repository, the private ones, and what was asked of it.

    `broken`: it refuses commits.
    """

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    broken: bool = False

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        path, given = path.partition("?")[0], path.rpartition("/")[2]
        if path == "/api/whoami-v2":
            role = {TOKEN: "write", READER: "read"}.get(token)
            user = {"name": "alice", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": role}}}
            return (200, user) if role else (401, {"error": "Invalid token"})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            self.blobs[given] = body
            return 200, {}
        asked = json.loads(body) if body.startswith(b"{") and b"\n" not in body else {}
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "there is one", "url": f"{self.address}/{name}"}
            self.repositories[name] = {".gitattributes": b""}
            self.private |= {name} if asked.get("visibility") == "private" else set()
            return 200, {"url": f"{self.address}/{name}"}
        name = "/".join(path.removeprefix("/api/models").removesuffix(".git/info/lfs/objects/batch").split("/")[1:3])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        files = self.repositories[name]
        if "/tree/" in path:
            return 200, [{"type": "file", "path": one, "oid": "0", "size": len(files[one])} for one in files]
        if "/preupload/" in path:
            ways = {one["path"]: "lfs" if one["path"].endswith("safetensors") else "regular" for one in asked["files"]}
            return 200, {"files": [{"path": p, "uploadMode": way, "shouldIgnore": False} for p, way in ways.items()]}
        if path.endswith("/objects/batch"):
            links = [
                {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}} for one in asked["objects"]
            ]
            return 200, {"transfer": "basic", "objects": links}
        assert "/commit/" in path, path
        if self.broken:
            return 403, {"error": "you have no permission"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits += 1
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run the stand-in during the context, as the hub of this process, for which it has a token that can write."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            status, content = hub.answer(self.path, token, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_GET

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            data = self.rfile.read(size)
            self.rfile.readline()
            return data

        def log_message(self, *given: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        for name, value in (("ENDPOINT", hub.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
