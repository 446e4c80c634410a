"""Sources from listings of names: which are images, and the splits and classes that folders give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from movq_cli.data.images import IMAGE_SUFFIXES
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Reader, Source

_TRAIN = "train"


_HELD_OUT = frozenset(["val", "valid", "validation", "test"])


def assemble(location: str, found: Sequence[str], reader: Reader, *, listed: bool = False) -> Source:
    """A source from the names that a folder or an archive holds, the member's number being its place.

    Args:
        location: As it was asked for.
        found: The names.
        reader: Of the files.
        listed: The user has named each of them: none is left out for its name.
    """
    members: dict[str, int] = {}
    latest = {name: member for member, name in enumerate(found)}  # a name stored twice: the later one counts
    for name, member in sorted(latest.items()):
        clean = _clean(name)
        if listed or (is_image(clean) and all(map(is_visible, clean.split("/")))):
            members[_distinct(clean, members)] = member
    if not members:
        raise BadRequestError(f"no image in {location}", f"Looked for: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    names = tuple(sorted(members))
    splits, labels, classes = _labels(names)
    return Source(location, names, tuple(members[name] for name in names), reader, labels, classes, splits)


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _clean(name: str) -> str:
    """The name as a relative path: outputs are named after their images, and must not leave their folder."""
    return "/".join(part for part in name.split("/") if part not in {"", ".", ".."})


def _distinct(name: str, taken: dict[str, int]) -> str:
    path, count = PurePosixPath(name), 1
    while name in taken:
        count += 1
        name = str(path.with_stem(f"{path.stem}~{count}"))
    return name


def _labels(
    names: Sequence[str],
) -> tuple[tuple[SplitName, ...] | None, tuple[int, ...] | None, tuple[str, ...]]:
    """Splits, labels and classes from folders: `[common/...][train|val/][class/...]image`."""
    parts = [name.split("/")[:-1] for name in names]
    depth = 0
    while len(tops := _level(parts, depth)) == 1 and None not in tops:
        depth += 1
    splits: tuple[SplitName, ...] | None = None
    if _TRAIN in tops and len(tops) > 1 and tops <= {_TRAIN, *_HELD_OUT}:
        splits = tuple("train" if folders[depth] == _TRAIN else "val" for folders in parts)
        depth += 1
    classes = _level(parts, depth)
    if None in classes or len(classes) < 2:
        return splits, None, ()
    numbers = {name: number for number, name in enumerate(sorted(map(str, classes)))}
    return splits, tuple(numbers[folders[depth]] for folders in parts), tuple(numbers)


def _level(parts: Sequence[Sequence[str]], depth: int) -> set[str | None]:
    """The folders at a depth; None for images that lie above it."""
    return {folders[depth] if depth < len(folders) else None for folders in parts}


def is_visible(part: str) -> bool:
    return not part.startswith(".") and part != "__MACOSX"


def split_of(path: Path) -> SplitName | None:
    """What a tar's name says, such as `imagenet1k-validation-03.tar`."""
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return "train" if _TRAIN in words else "val" if words & _HELD_OUT else None
