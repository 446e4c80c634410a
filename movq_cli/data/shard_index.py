"""The member of a shard that has the labels and the sources of its images, and the errors of a damaged shard."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from movq_cli.errors import BadRequestError

INDEX = "dataset.json"
"""Member of each shard with the labels as NVIDIA's tools read them, the source of each image, and the rejects."""

_MAX_BYTES = 2**26
"""Largest size of this member: a shard has a thousand images, and a path has at most 4,096 bytes."""

SHARD_REMEDY = "Run the same `movq prepare` again: it makes damaged and missing shards again."
"""Remedy in the error of a damaged shard."""


def read_index(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return the index of a shard.

    Raises:
        KeyError: The shard has none.
        ValueError: It is too large, or it is no JSON object.
        zipfile.BadZipFile: The shard is damaged.
    """
    info = archive.getinfo(INDEX)
    if info.file_size > _MAX_BYTES:
        raise ValueError(f"its {INDEX} has {info.file_size} bytes")
    try:
        index = json.loads(archive.read(info))
    except RecursionError:
        raise ValueError(f"its {INDEX} is nested too deeply") from None
    if not isinstance(index, dict):
        raise ValueError(f"its {INDEX} is no JSON object")
    return index


def labels_of(index: dict[str, Any], names: Sequence[str], classes: int) -> list[int]:
    """Return the label of each image of a shard.

    Args:
        index: Index of the shard.
        names: Names of its images.
        classes: Number of classes; 0 if the images have no labels.

    Raises:
        ValueError: The labels are not those of the images, or a label is not the index of a class.
    """
    labels = index["labels"] or []
    if [name for name, _ in labels] != (list(names) if classes else []):
        raise ValueError(f"{len(labels)} labels for {len(names)} images of a set with {classes} classes")
    for name, label in labels:
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"{name} has the label {label}, but there are {classes} classes")
    return [label for _, label in labels]


def sources_of(path: Path) -> dict[str, str]:
    """Return the name in its source of each image of a shard, by its name in the shard.

    Raises:
        BadRequestError: The file is damaged.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        sources = read_index(archive)["sources"]
        if not isinstance(sources, dict) or not all(isinstance(source, str) for source in sources.values()):
            raise ValueError("its sources are not names")
        return sources


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the exceptions of a damaged shard into an error that names it."""
    try:
        yield
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, struct.error) as error:
        raise BadRequestError(f"shard {path} is damaged ({error})", SHARD_REMEDY) from None
