"""Shards of a prepared set: how one is written, and what the file of a finished one holds."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from movq_cli import digests
from movq_cli.data.shard_index import INDEX, SHARD_REMEDY, read_index, reading
from movq_cli.data.shards import PNG_HEADER
from movq_cli.files import atomic_file, sha256


class Entry(NamedTuple):
    """An image for a shard."""

    name: str  # name in the shard, from `member_name`
    data: bytes  # PNG file
    label: int | None
    source: str  # name in the source


class Reject(NamedTuple):
    """An image that was rejected."""

    source: str  # name in the source
    reason: str


class ShardReport(NamedTuple):
    """The content of a finished shard."""

    images: int  # number of images
    rejects: tuple[Reject, ...]
    sides: tuple[int, int] | None  # smallest and largest side, pixels; None = there are no images
    sha256: str  # hash of the file
    digest: str  # the digest that the file carries


def write_shard(path: Path, images: Iterable[Entry | Reject], *, concurrent: bool = False) -> None:
    """Write a shard, completely or not at all; the same images give the same bytes on every machine.

    Args:
        path: Path of the zip file.
        images: Images in the order of their names; they are taken one at a time.
        concurrent: Whether other processes may write the same shard at the same time.

    Raises:
        FailureError: It could not be written.
    """
    entries: list[Entry] = []
    rejects: list[Reject] = []
    with atomic_file(path, concurrent=concurrent) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for image in images:
                if isinstance(image, Reject):
                    rejects.append(image)
                else:
                    archive.writestr(_member(image.name), image.data)
                    entries.append(image._replace(data=image.data[:PNG_HEADER]))
            archive.writestr(_member(INDEX), json.dumps(_describe(entries, rejects)))
        digests.append_to_zip(file)


def inspect_shard(path: Path, sources: Iterable[str] | None = None) -> ShardReport:
    """Report the content of a finished shard, from its file only.

    Args:
        path: Path of the zip file.
        sources: Names in their source of the images from which it must have been made, those of rejected images
            included; None accepts any.

    Raises:
        BadRequestError: The file is missing, damaged, or was made from other images.
    """
    digests.check(path, SHARD_REMEDY)
    with reading(path), zipfile.ZipFile(path) as archive:
        index = read_index(archive)
        found = [*index["sources"].values(), *(name for name, _ in index["rejects"])]
        if sources is not None and sorted(found) != sorted(sources):
            raise ValueError("it was made from other images")
        return ShardReport(
            images=len(index["sources"]),
            rejects=tuple(Reject(*reject) for reject in index["rejects"]),
            sides=tuple(index["sides"]) if index["sides"] else None,
            sha256=sha256(path),
            digest=digests.stored_in(path) or "",
        )


def content_hash(reports: Mapping[str, ShardReport]) -> str:
    """Return one SHA-256 for a set.

    Args:
        reports: Report of each shard by its name (`train/00000.zip`).
    """
    lines = [f"{name} {reports[name].sha256}\n" for name in sorted(reports)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _describe(entries: list[Entry], rejects: list[Reject]) -> dict[str, Any]:
    sides = [side for entry in entries for side in struct.unpack(">II", entry.data[16:24])]
    labels = [[entry.name, entry.label] for entry in entries if entry.label is not None]
    return {
        "labels": labels or None,
        "sources": {entry.name: entry.source for entry in entries},
        "rejects": rejects,
        "sides": [min(sides), max(sides)] if sides else None,
    }


def _member(name: str) -> zipfile.ZipInfo:
    # By default, time, system and permissions would depend on the machine and the time.
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info
