"""Where pretrained weights are looked for, and what happens where they are not."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from movq_cli.errors import BadRequestError, FailureError
from movq_cli.evaluation import pretrained
from movq_cli.evaluation.pretrained import WEIGHTS, Network

Publisher = tuple[dict[Network, bytes], list[Network]]

pytestmark = pytest.mark.usefixtures("offline")


def put(folder: Path, name: Network, tensors: dict[str, Tensor]) -> Path:
    path = folder / WEIGHTS[name].file
    torch.save(tensors, path)
    return path


def test_the_users_folder_wins_over_the_hubs(tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    there = put(hub, "alex", {})
    assert pretrained.find_weights("alex") == there
    assert pretrained.find_weights("alex", tmp_path) == there
    assert [name for name in WEIGHTS if pretrained.is_available(name)] == ["alex"]
    here = put(tmp_path, "alex", {})
    assert pretrained.find_weights("alex", tmp_path) == here


@pytest.mark.parametrize("name", ["inception", "vgg", "alex"])
def test_missing_weights_say_which_file_where_and_what_to_do(tmp_path: Path, name: Network) -> None:
    patience = socket.getdefaulttimeout()
    with pytest.raises(BadRequestError) as caught:
        pretrained.find_weights(name, tmp_path)
    message = str(caught.value)
    known = WEIGHTS[name]
    parts = [
        known.file,
        f"{known.megabytes} MB",
        str(tmp_path),
        "checkpoints",
        "--weights",
        known.url,
        "refused",
    ]
    assert all(part in message for part in parts)
    assert socket.getdefaulttimeout() == patience
    assert not list((tmp_path / "hub").rglob("*.p*"))


def test_nothing_is_downloaded_without_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(BadRequestError, match="no weights"):
        pretrained.find_weights("vgg", download=False)
    with pytest.raises(BadRequestError, match="no folder of weights"):
        pretrained.find_weights("vgg", tmp_path / "nowhere")


def test_a_download_lands_in_the_hub_folder_checked_against_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: calls.append((args, kwargs)))
    path = pretrained.find_weights("vgg")
    assert path.parent.name == "checkpoints"
    assert calls == [((WEIGHTS["vgg"].url, str(path)), {"hash_prefix": "397923af", "progress": False})]


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    """A server on this machine that gives each file of weights, under a name that ends in its true hash."""
    content = {name: f"the weights of {name}".encode() * 1000 for name in WEIGHTS}
    requests: list[Network] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name: Any = self.path.strip("/").partition("-")[0]
            requests.append(name)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content[name])))
            self.end_headers()
            self.wfile.write(content[name])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, known in list(WEIGHTS.items()):
        file = f"{name}-{hashlib.sha256(content[name]).hexdigest()[:8]}.pth"
        url = f"http://127.0.0.1:{server.server_port}/{file}"
        monkeypatch.setitem(WEIGHTS, name, dataclasses.replace(known, file=file, url=url))
    yield content, requests
    server.shutdown()


def test_weights_are_fetched_once_into_the_folder_that_is_named(tmp_path: Path, publisher: Publisher) -> None:
    content, requests = publisher
    folder = tmp_path / "to carry"
    for name in WEIGHTS:
        path = pretrained.download(name, folder)
        assert path.parent == folder
        assert path.read_bytes() == content[name]
        assert pretrained.is_published(path)
        assert pretrained.download(name, folder) == path
        assert pretrained.find_weights(name, folder, download=False) == path
    assert requests == list(WEIGHTS)
    assert not pretrained.is_available("vgg")
    assert pretrained.download("vgg").parent == pretrained.search_folders(None)[0]
    assert pretrained.is_available("vgg")


def test_what_arrives_with_another_hash_is_removed(tmp_path: Path, publisher: Publisher) -> None:
    content, _ = publisher
    content["alex"] += b"and something else"
    with pytest.raises(FailureError, match=rf"cannot download {WEIGHTS['alex'].file}.*hash"):
        pretrained.download("alex", tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())
    other = put(tmp_path, "vgg", {})
    assert not pretrained.is_published(other)
