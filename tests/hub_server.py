"""A Hugging Face Hub on this machine: as much of its HTTP interface as uploads and downloads need, files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "c" * 40
TOKEN = "hf_secret"


@dataclass
class Repository:
    """One repository: its files, and whether others see it."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Page:
    """Any other answer, by path."""

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    pages: dict[str, Page] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Git LFS objects by SHA-256."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """(method, path, headers)."""
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    """{beginning of "METHOD path": (status, error code)}."""
    open_to_all: bool = True
    """Whether files may be read without a login."""
    corrupt: bool = False
    """Whether downloads have a byte changed on the way."""

    def asked(self, path: str) -> list[dict[str, str]]:
        """Return the headers of all requests for that path."""
        return [headers for _, place, headers in self.requests if place.partition("?")[0] == path]


@contextmanager
def serving() -> Iterator[Hub]:
    """Yield a running hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, somebody logged in, and its large files sent as plain ones."""
    from huggingface_hub import close_session, constants

    with serving() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("CIVITAI_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        close_session()
        yield running
        close_session()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        for start, (status, code) in self.hub.refusals.items():
            if f"{self.command} {path}".startswith(start):
                return self._answer(b"{}", status, {"x-error-code": code} if code else {})
        if page := self.hub.pages.get(path):
            return self._answer(page.body, page.status, page.headers)
        steps = path.strip("/").split("/")
        if self.command == "PUT" and steps[0] == "lfs":
            assert hashlib.sha256(body).hexdigest() == steps[1]
            self.hub.large[steps[1]] = body
            return self._answer(b"")
        if steps[0] == "api":
            return self._api(steps[1:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if len(steps) > 3 and steps[2] == "resolve":
            return self._resolve("/".join(steps[:2]), steps[3], "/".join(steps[4:]))
        return self._answer(b"<html>not found</html>", 404, {"content-type": "text/html"})

    def _api(self, steps: list[str], body: bytes) -> None:
        if steps == ["validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}" and not self.hub.open_to_all:
            return self._answer(b"{}", 401, {"x-error-code": "RepoNotFound"})
        if steps == ["repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
            return self._json({"url": f"{self.hub.address}/{name}", "name": name})
        name = "/".join(steps[1:3])
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._answer(b"{}", 404, {"x-error-code": "RepoNotFound"})
        if steps[3:4] == ["preupload"]:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if _is_large(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if steps[3:4] == ["commit"]:
            return self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
        if steps[3:4] == ["revision"] and steps[4] not in ("main", COMMIT):
            return self._answer(b"{}", 404, {"x-error-code": "RevisionNotFound"})
        siblings = [{"rfilename": file} for file in [".gitattributes", *repository.files]]
        return self._json({"id": name, "sha": COMMIT, "private": repository.private, "siblings": siblings})

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        assert self.headers.get("authorization") == f"Bearer {TOKEN}"
        header = lines[0]["value"]
        if header.get("parentCommit", COMMIT) != COMMIT:
            return self._answer(b"{}", 412)
        arrived = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                arrived[value["path"]] = self.hub.large[value["oid"]]
            else:
                arrived[value["path"]] = base64.b64decode(value["content"])
        repository.files |= arrived
        repository.commits.append({"message": header["summary"], "files": arrived})
        return self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{entry['oid']}"}}}
            for entry in wanted["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("authorization") != f"Bearer {TOKEN}"):
            return self._answer(b"", 401, {"x-error-code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._answer(b"", 404, {"x-error-code": "RevisionNotFound"})
        if file not in repository.files:
            return self._answer(b"Entry not found", 404, {"x-error-code": "EntryNotFound"})
        data = repository.files[file]
        tag = {"x-linked-etag": f'"{hashlib.sha256(data).hexdigest()}"'} if _is_large(file) else {}
        if "redirect" in parse_qs(urlsplit(self.path).query) or not _is_large(file):
            return self._answer(data[:-1] + b"\0" if self.hub.corrupt else data, 200, tag)
        return self._answer(b"", 302, {**tag, "location": f"{self.path.partition('?')[0]}?redirect=1"})

    def _json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), 200, {"content-type": "application/json"})

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        wanted = self.headers.get("range", "")
        if status == 200 and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            body, status = body[int(first) : int(last) + 1], 206
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if not {"content-length", "transfer-encoding"} & (headers or {}).keys():
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        if "transfer-encoding" in (headers or {}):
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))
