"""`movq weights`: list the files of pretrained weights that are available, and download the missing ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from movq_cli.console import Console
from movq_cli.evaluation import pretrained
from movq_cli.evaluation.pretrained import WEIGHTS, Network


def show_weights(folder: Path | None, *, fetch: bool, console: Console) -> None:
    """List the files of pretrained weights and the folders that are searched; download missing files on request.

    Args:
        folder: Folder that is searched before torch hub's, and into which files are downloaded; a download creates it
            if it is missing. None uses torch hub's alone.
        fetch: Whether to download the missing files.
        console: Console for the result.

    Raises:
        BadRequestError: The folder does not exist, and nothing is to be downloaded.
        FailureError: A file cannot be downloaded.
    """
    if fetch:
        for name, known in WEIGHTS.items():
            console.log(f"{known.file}: {known.megabytes} MB from {known.url}")
            pretrained.download(name, folder)
    files = {name: _describe(name, folder) for name in WEIGHTS}
    searched = [str(path) for path in pretrained.search_folders(folder)]
    console.log(f"searched {', then '.join(searched)}")
    rows = [
        [name, file["file"], f"{file['megabytes']} MB", _state(file), file["purpose"]] for name, file in files.items()
    ]
    console.table({"weights": files, "searched": searched}, ["network", "file", "size", "path", "purpose"], rows)


def _describe(name: Network, folder: Path | None) -> dict[str, Any]:
    """Return what is known of a network's file, with its path and hash if it is available."""
    known = asdict(WEIGHTS[name])
    if not pretrained.is_available(name, folder):
        return known | {"path": None}
    path = pretrained.find_weights(name, folder)
    return known | {"path": str(path), "published": pretrained.is_published(path)} | pretrained.record(path)


def _state(file: Mapping[str, Any]) -> str:
    if file["path"] is None:
        return "missing"
    return str(file["path"]) if file["published"] else f"{file['path']} (not the published file)"
