"""Files beside images that say what the images show: NVIDIA's `dataset.json`, and lists of the validation images."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from movq_cli.data.images import BadImageError
from movq_cli.data.shard_index import INDEX
from movq_cli.sources.source import UNREADABLE, Reader
from movq_cli.sources.text_files import MAX_TEXT_BYTES
from movq_cli.text_encoding import TextEncodingError, decode_text

VAL_LISTS = frozenset(["val_annotations.txt", "LOC_val_solution.csv"])
"""Lists with the classes of validation images, as Tiny ImageNet and Kaggle's ImageNet distribute them."""


class IndexLabels(NamedTuple):
    """The labels that the `dataset.json` files beside images give."""

    values: tuple[int | str | None, ...]  # label of each image; None = the files give it none
    has_labels: bool  # whether at least one file has labels; a file may also say that there are none
    used: frozenset[str]  # names of the files


def index_labels(names: Sequence[str], others: Mapping[str, int], reader: Reader) -> IndexLabels | None:
    """Return the labels that NVIDIA's `dataset.json` files give to images; None if there is no such file.

    A file describes the images in its folder and below. Where two describe an image, the one in the deeper folder
    counts.

    Args:
        names: Names of the images.
        others: Member numbers of the files that are no images, by their names.
        reader: Access to the files.
    """
    found: dict[str, dict[str, int | str]] = {}
    used: set[str] = set()
    for file, member in others.items():
        path = PurePosixPath(file)
        labels = _parse_index(read_text(reader, member)) if path.name == INDEX else None
        if labels is not None:
            folder = "" if str(path.parent) == "." else f"{path.parent}/"
            found[folder] = {normal_name(folder + name): label for name, label in labels.items()}
            used.add(file)
    if not found:
        return None
    values: dict[str, int | str | None] = dict.fromkeys(names)
    for folder in sorted(found, key=len):
        values |= {name: found[folder].get(normal_name(name)) for name in names if name.startswith(folder)}
    return IndexLabels(tuple(values[name] for name in names), any(found.values()), frozenset(used))


def read_text(reader: Reader, member: int) -> str:
    """Return a text file of a source; an empty text if it cannot be read, is too large, or is in another encoding.

    Args:
        reader: Access to the files.
        member: Number of the file.
    """
    try:
        data = reader.read(member)
        return "" if len(data) > MAX_TEXT_BYTES else decode_text(data)
    except (BadImageError, TextEncodingError, *UNREADABLE):
        return ""


def _parse_index(text: str) -> dict[str, int | str] | None:
    """Return the labels by the images' names; empty if the file says that there are none; None if it is no index."""
    try:
        index = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(index, dict) or "labels" not in index:
        return None
    labels = index["labels"]
    if labels is None:
        return {}
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    try:
        return {name.replace("\\", "/"): _as_label(label) for name, label in pairs}
    except (AttributeError, TypeError, ValueError):
        return None


def _as_label(label: object) -> int | str:
    """Return the class that a label stands for: a number, a name, or the position of the one in a one-hot vector."""
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, list) and len(label) > 1 and sorted(label) == [0] * (len(label) - 1) + [1]:
        return label.index(1)
    if not isinstance(label, int | str):
        raise TypeError(label)
    return label


def normal_name(name: str) -> str:
    """Return a name in one Unicode form: macOS stores the parts of an accented letter, and other systems the letter."""
    return unicodedata.normalize("NFC", name)
