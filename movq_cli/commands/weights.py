"""`movq weights`: which pretrained networks' weights are here, and fetch them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from movq_cli.console import Console
from movq_cli.evaluation import pretrained
from movq_cli.evaluation.pretrained import WEIGHTS, Network


def show_weights(folder: Path | None, *, fetch: bool, console: Console) -> None:
    """List the files of weights with where they are looked for, and fetch those that are missing where that is wanted.

    Args:
        folder: Searched before torch hub's; where files are fetched to, made where it is missing. None = torch hub's.
        fetch: Download what is missing.
        console: Where to speak.

    Raises:
        BadRequestError: The folder does not exist, and nothing is to be fetched.
        FailureError: A file cannot be downloaded.
    """
    if fetch:
        for name, wanted in WEIGHTS.items():
            console.log(f"{wanted.file}: {wanted.megabytes} MB from {wanted.url}")
            pretrained.download(name, folder)
    files = {name: _describe(name, folder) for name in WEIGHTS}
    searched = [str(place) for place in pretrained.search_folders(folder)]
    console.log(f"looked for in {', then '.join(searched)}")
    rows = [
        [name, told["file"], f"{told['megabytes']} MB", _state(told), told["purpose"]] for name, told in files.items()
    ]
    console.table({"weights": files, "searched": searched}, ["network", "file", "size", "where", "for"], rows)


def _describe(name: Network, folder: Path | None) -> dict[str, Any]:
    path = pretrained.find_weights(name, folder) if pretrained.is_available(name, folder) else None
    here = {"path": None} if path is None else {"path": str(path), "published": pretrained.is_published(path)}
    return asdict(WEIGHTS[name]) | (here if path is None else here | pretrained.record(path))


def _state(told: Mapping[str, Any]) -> str:
    if told["path"] is None:
        return "missing"
    return str(told["path"]) if told["published"] else f"{told['path']} (not the published file)"
