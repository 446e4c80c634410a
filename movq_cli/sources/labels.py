"""Sources made from a list of file names: which files are images, and the splits and classes that folders give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from movq_cli.data.images import IMAGE_SUFFIXES
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Reader, Source

MAX_CLASSES = 2**16
"""Largest number of classes that are known by their numbers: a prior's classes and codes share a table of this size."""

_TRAIN = "train"
_HELD_OUT = frozenset(["val", "valid", "validation", "test"])


def assemble(location: str, files: Sequence[str], reader: Reader, *, is_list: bool = False) -> Source:
    """Make a source from the file names that a folder, an archive or a list holds.

    Args:
        location: Location as the user gave it.
        files: Names of the files. The member number of a file is its index here.
        reader: Access to the files.
        is_list: Whether the user has listed each file: then none is left out for its suffix or for being hidden.

    Returns:
        The source, with safe and unique names, and with splits, labels and classes as its folders give them.

    Raises:
        BadRequestError: No file is an image.
    """
    members: dict[str, int] = {}
    latest = {file: member for member, file in enumerate(files)}  # of equal names, the last counts
    for file, member in sorted(latest.items()):
        name = _safe_name(file)
        if is_list or (is_image(name) and all(map(is_visible, name.split("/")))):
            members[_unique_name(name, members)] = member
    if not members:
        raise BadRequestError(f"no image in {location}", f"Looked for: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    names = tuple(sorted(members))
    splits, labels, classes = _folder_labels(names)
    return Source(location, names, tuple(members[name] for name in names), reader, labels, classes, splits)


def number_classes(class_names: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Turn the class name of each image into labels.

    Returns:
        The label of each image, and the classes in sorted order.
    """
    numbers = {name: number for number, name in enumerate(sorted(set(class_names)))}
    return tuple(numbers[name] for name in class_names), tuple(numbers)


def class_numbers(origin: str, largest: int) -> tuple[str, ...]:
    """Return the names of the classes 0 to `largest`, which are their numbers.

    Args:
        origin: File or array that holds the numbers, for the error message.
        largest: Largest number of a class.

    Raises:
        BadRequestError: There would be more than `MAX_CLASSES` classes.
    """
    if largest >= MAX_CLASSES:
        number = str(largest) if largest < 10**20 else "of more than 20 digits"
        message = f"{origin} holds the class number {number}, but the largest possible one is {MAX_CLASSES - 1}"
        remedy = "Correct it, or remove the class numbers: arr_1 of an .npz file, the .cls and .json files of a tar."
        raise BadRequestError(message, remedy)
    return tuple(map(str, range(largest + 1)))


def is_image(name: str) -> bool:
    """Return whether the suffix of a file's name is that of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_visible(part: str) -> bool:
    """Return whether a file or folder is read by its name: not a hidden one, and not the metadata of macOS."""
    return not part.startswith(".") and part != "__MACOSX"


def split_of(path: Path) -> SplitName | None:
    """Return the split that a file's name contains, as in `imagenet1k-validation-03.tar`; None if there is none."""
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return "train" if _TRAIN in words else "val" if words & _HELD_OUT else None


def _safe_name(file: str) -> str:
    """Return the name as a relative path: output files are named after images, and must stay in their folder."""
    return "/".join(part for part in file.replace("\0", "_").split("/") if part not in {"", ".", ".."})


def _unique_name(name: str, taken: dict[str, int]) -> str:
    path, number = PurePosixPath(name), 1
    while name in taken:
        number += 1
        name = str(path.with_stem(f"{path.stem}~{number}"))
    return name


def _folder_labels(
    names: Sequence[str],
) -> tuple[tuple[SplitName, ...] | None, tuple[int, ...] | None, tuple[str, ...]]:
    """Return splits, labels and classes from folders: `[common/...][train|val/][class/...]image`."""
    folders = [name.split("/")[:-1] for name in names]
    depth = 0
    while len(tops := _folders_at(folders, depth)) == 1 and None not in tops:
        depth += 1
    splits: tuple[SplitName, ...] | None = None
    if _TRAIN in tops and len(tops) > 1 and tops <= {_TRAIN, *_HELD_OUT}:
        splits = tuple("train" if path[depth] == _TRAIN else "val" for path in folders)
        depth += 1
    found = _folders_at(folders, depth)
    if None in found or len(found) < 2:
        return splits, None, ()
    labels, classes = number_classes([path[depth] for path in folders])
    return splits, labels, classes


def _folders_at(folders: Sequence[Sequence[str]], depth: int) -> set[str | None]:
    """Return the names of the folders at a depth; None among them stands for images that lie above it."""
    return {path[depth] if depth < len(path) else None for path in folders}
