"""A server on loopback that speaks the part of the Hugging Face hub's protocol which huggingface_hub uses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_loopback"
"""The token of an account that may read and write every repository."""

_LARGE = (".safetensors", ".ckpt", ".bin", ".pt")
"""Suffixes of files that the hub stores by Git LFS."""

Files = dict[str, bytes]


@dataclass
class Stored:
    """A repository: the files of each commit, and the commits of its branches."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add files to a branch, and return the new commit."""
        new = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        name = hashlib.sha1(repr((len(self.commits), sorted(new))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = new, name
        return name

    def files(self, revision: str) -> tuple[str, Files] | None:
        name = self.branches.get(revision, revision)
        return (name, self.commits[name]) if name in self.commits else None


class LoopbackHub:
    """The server; its repositories are changed by tests while it runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Stored] = {}
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.replaced: bytes | None = None
        """What downloads get in place of a file that the hub stores by Git LFS; None = the file."""
        self.page: bytes | None = None
        """What every request gets, with the status 200; None = what it is for."""
        self.status: int | None = None
        """Status of every answer; None = the usual ones."""
        self.uploads: dict[str, bytes] = {}
        self.url = ""

    def add(
        self,
        name: str,
        files: Files | None = None,
        folder: Path | None = None,
        *,
        is_private: bool = False,
        is_gated: bool = False,
    ) -> str:
        """Add files, or those of a folder, to a repository, and return its commit."""
        stored = self.repositories.setdefault(name, Stored(is_private=is_private, is_gated=is_gated))
        if folder is not None:
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
        return stored.commit(files or {})

    def downloaded(self) -> list[str]:
        """Return the names of the files whose content was sent, in order."""
        gets = [path for method, path in self.requests if method == "GET"]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in gets if "/resolve/" in path]


@contextmanager
def running() -> Iterator[LoopbackHub]:
    """Yield a hub that runs during the block."""
    hub = LoopbackHub()

    class Bound(_Handler):
        pass

    Bound.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.page is not None:
            self._send(200, self.hub.page, {"Content-Type": "text/html"})
        elif self.hub.status is not None:
            self._send(self.hub.status, b"{}")
        elif self.command in {"GET", "HEAD"}:
            self._read(path)
        elif path.startswith("/lfs/"):  # The address is signed in place of a token.
            self._store(path, body)
        elif not self._is_known():
            self._send(401, b'{"error": "Invalid username or password."}')
        else:
            self._write(path, body)

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _read(self, path: str) -> None:
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = info or resolve
        if match is None:
            return self._send(404, b"{}")
        stored = self.hub.repositories.get(match[1])
        if stored is None or (stored.is_private and not self._is_known()):
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        found = stored.files(match[2] or "main")
        if found is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if info is not None:
            return self._json({"id": match[1], "sha": commit, "siblings": [_sibling(*item) for item in files.items()]})
        if stored.is_gated and not self._is_known():
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        assert resolve is not None
        if resolve[3] not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[resolve[3]]
        etag = hashlib.sha256(data).hexdigest()
        if self.hub.replaced is not None and resolve[3].endswith(_LARGE):
            data = self.hub.replaced
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _write(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            if name in hub.repositories:
                return self._json({"url": f"{hub.url}/{name}"}, 409)
            hub.add(name, is_private=values.get("visibility") == "private")
            return self._json({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(match[1], match[2], body)
        return self._send(404, b"{}")

    def _store(self, path: str, body: bytes) -> None:
        """Store an uploaded file, if its content has the hash by which it is stored."""
        oid = path.removeprefix("/lfs/")
        is_intact = hashlib.sha256(body).hexdigest() == oid
        self.hub.uploads |= {oid: body} if is_intact else {}
        self._send(200 if is_intact else 400, b"")

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        files: Files = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.uploads[item["value"]["oid"]]
        commit = self.hub.repositories[name].commit(files, branch)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _json(self, values: Any, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode(name: str) -> str:
    return "lfs" if name.endswith(_LARGE) else "regular"


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return {"rfilename": name, "size": len(data)} | ({"lfs": lfs} if _mode(name) == "lfs" else {})


def connect(hub: LoopbackHub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub use a hub and a cache in this process, and in those that it starts, without a token."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache / "token"),
    }
    for name, value in settings.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_HOME", str(cache.parent))
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    patch.delenv("HF_TOKEN", raising=False)
