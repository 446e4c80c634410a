"""The member of a shard that says which labels and sources its images have."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from typing import Any

INDEX = "dataset.json"
"""Member of each shard with the labels as NVIDIA's tools read them, the source of each image, and the rejects."""

_MAX_BYTES = 2**26
"""Largest size of this member: a shard has a thousand images, and a path has at most 4,096 bytes."""


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
