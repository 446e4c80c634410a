"""Builds a source from a listing of file names: chooses the images, and derives splits and classes from folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from movq_cli.data.images import IMAGE_SUFFIXES
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Reader, Source

TRAIN = "train"
HELD_OUT = frozenset(["val", "valid", "validation", "test"])
"""Names of folders, and words in the names of tars, that mark the two splits."""


def source_of_names(location: str, listing: Sequence[str], reader: Reader, *, keep_all: bool = False) -> Source:
    """Build a source from the file names in a folder or an archive.

    Args:
        location: What the user gave, for messages.
        listing: File names; the position of a name is its member number.
        reader: Reader of the files.
        keep_all: Keep every name, even without an image suffix or with a hidden folder: the user listed each file.

    Returns:
        The images in ascending order of their names, with the splits and classes that their folders give.

    Raises:
        BadRequestError: No name is that of an image.
    """
    members: dict[str, int] = {}
    latest = {name: member for member, name in enumerate(listing)}  # an archive may store a name twice; the last counts
    for name, member in sorted(latest.items()):
        relative = _relative(name)
        if keep_all or (is_image(relative) and all(map(is_visible, relative.split("/")))):
            members[_unique(relative, members)] = member
    if not members:
        raise BadRequestError(f"no image in {location}", f"Looked for: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    names = tuple(sorted(members))
    splits, labels, classes = _splits_and_labels(names)
    return Source(location, names, tuple(members[name] for name in names), reader, labels, classes, splits)


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image format that movq reads."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_visible(part: str) -> bool:
    """Return whether a part of a path is neither hidden nor one of the folders that macOS adds to archives."""
    return not part.startswith(".") and part != "__MACOSX"


def numbered(classes: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Number class names in ascending order.

    Args:
        classes: The class name of each image.

    Returns:
        The label of each image, and the distinct class names that the labels index.
    """
    names = sorted(set(classes))
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(numbers[name] for name in classes), tuple(names)


def _relative(name: str) -> str:
    """Make a path relative and free of `..`: outputs are named after their images and must not leave their folder."""
    return "/".join(part for part in name.split("/") if part not in {"", ".", ".."})


def _unique(name: str, taken: dict[str, int]) -> str:
    path, number = PurePosixPath(name), 1
    while name in taken:
        number += 1
        name = str(path.with_stem(f"{path.stem}~{number}"))
    return name


def _splits_and_labels(
    names: Sequence[str],
) -> tuple[tuple[SplitName, ...] | None, tuple[int, ...] | None, tuple[str, ...]]:
    """Derive splits, labels and classes from folders: `[common/...][train|val/][class/...]image`."""
    folders = [name.split("/")[:-1] for name in names]
    depth = 0
    while len(level := _folders_at(folders, depth)) == 1 and None not in level:
        depth += 1
    splits: tuple[SplitName, ...] | None = None
    if TRAIN in level and len(level) > 1 and level <= {TRAIN, *HELD_OUT}:
        splits = tuple("train" if path[depth] == TRAIN else "val" for path in folders)
        depth += 1
    level = _folders_at(folders, depth)
    if None in level or len(level) < 2:
        return splits, None, ()
    labels, classes = numbered([path[depth] for path in folders])
    return splits, labels, classes


def _folders_at(folders: Sequence[Sequence[str]], depth: int) -> set[str | None]:
    """Return the folder names at a depth; None stands for images that lie above it."""
    return {path[depth] if depth < len(path) else None for path in folders}
