"""Stand-in of the Hugging Face hub's HTTP API on localhost: login, uploads, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_writer"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Repositories of others, in which the token may not write
FOREIGN = "someone-else/"

# Content to send as JSON, and the status
Reply = tuple[dict[str, Any], int]
UNAUTHORIZED: Reply = {"error": "Unauthorized"}, 401


class Hub(ThreadingHTTPServer):
    """Keeps what was committed: repository -> file's name -> content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        self.server.uploads[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self._body()
        self._answer(*(self._reply(body) if self._may_write() else UNAUTHORIZED))

    def _reply(self, body: bytes) -> Reply:
        hub = self.server
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            if name.startswith(FOREIGN):
                return {"error": "Forbidden"}, 403
            hub.repositories.setdefault(name, {})
            return {"url": f"{hub.url}/{name}"}, 200
        if self.path.endswith("/preupload/main"):
            files = [_upload_mode(file["path"]) for file in json.loads(body)["files"]]
            return {"files": files}, 200
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._lfs_object(given) for given in json.loads(body)["objects"]]
            return {"transfer": "basic", "objects": objects}, 200
        if self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            self._commit(hub.repositories[name], body)
            return {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}, 200
        return {"error": "Not found"}, 404

    def _get(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.path == "/api/whoami-v2":
            self._answer(*(({"name": "me"}, 200) if self._may_write() else UNAUTHORIZED))
            return
        repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
        content = self.server.repositories.get(repository, {}).get(file)
        if content is None:
            self._answer({}, 200 if self.path == "/" else 404)
        else:
            self._send(content, 200)

    def _may_write(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def _lfs_object(self, given: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/lfs/{given['oid']}"
        return {**given, "actions": {"upload": {"href": href}}}

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status)

    def _send(self, content: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub in a thread."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def use_hub(patch: pytest.MonkeyPatch, url: str, cache: Path, token: str = "") -> None:
    """Direct huggingface_hub to `url`, with `token` or without a login, as its variables do."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    if token:
        patch.setenv("HF_TOKEN", token)
    patch.setenv("NO_PROXY", "127.0.0.1")
    constants = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in constants.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
