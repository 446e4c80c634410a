"""The names that the images of a prepared set had in their source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from movq_cli.data.shard_index import sources_of
from movq_cli.data.shards import PLAN, SPLITS, PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import is_unsafe

_LONGEST_PART = 240
"""Largest number of bytes of a part of a name: file systems allow 255, and `.png.partial` is appended while writing."""


def original_names(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names in their source of images of a prepared set.

    Where two images of the result would have the same name, as files of two archives can have, the name in the set
    stands before it.

    Args:
        root: Folder of the set.
        names: Names of the images in the set, such as `train/00000/img00000042.png`.

    Raises:
        BadRequestError: The folder is no prepared set, a shard is damaged, or a name is not one of a file below a
            folder.
    """
    if not (root / PLAN).is_file():
        raise BadRequestError(
            f"{root} is not a prepared set, so that --source-names has no effect", "Omit --source-names."
        )
    prepared = PreparedSet.open(root)
    sources: dict[str, str] = {}
    for split in SPLITS:
        for path in prepared.split(split).paths:
            sources |= {f"{split}/{member}": source for member, source in sources_of(path).items()}
    for name in names:
        _check(sources.get(name, ""), name, root)
    counts = Counter(sources[name] for name in names)
    return tuple(
        sources[name] if counts[sources[name]] == 1 else f"{Path(name).with_suffix('')}/{sources[name]}"
        for name in names
    )


def _check(source: str, name: str, root: Path) -> None:
    """Refuse a name that is not one of a file below a folder."""
    try:
        is_long = any(len(os.fsencode(part)) > _LONGEST_PART for part in source.split("/"))
    except UnicodeEncodeError:  # No file system has such a name.
        is_long = True
    if not source or source.startswith("/") or is_unsafe(source) or is_long or "\0" in source:
        raise BadRequestError(
            f"{root}: the image {name} was called {source[:100]!r}, which is not the name of a file below a folder",
            "Omit --source-names.",
        )
