"""Prepared data sets, as `movq prepare` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from movq_cli.data.shards import PLAN, SPLITS, PreparedSet, Split, shard_path
from movq_cli.sources.source import Source, SourceKind, register


@dataclass(frozen=True)
class PreparedReader:
    """Reads the images of a prepared data set; the images of one split follow those of the other."""

    splits: tuple[Split, ...]

    def read(self, member: int) -> bytes:
        """Return an image as a PNG file."""
        for split in self.splits:
            if member < len(split):
                return split.read(member)
            member -= len(split)
        raise IndexError(member)


def is_prepared(path: Path) -> bool:
    """Return whether a folder is a prepared data set, finished or not.

    The manifest does not tell: a folder of samples has a file of the same name.
    """
    return (path / PLAN).is_file() or shard_path(path, "train", 0).is_file()


def _open(location: str, path: Path) -> Source:
    prepared = PreparedSet.open(path)
    splits = {name: prepared.split(name) for name in SPLITS}
    manifest = prepared.manifest
    labels = [label for split in splits.values() if split.labels is not None for label in split.labels.tolist()]
    names = [f"{name}/{split.name(index)}" for name, split in splits.items() for index in range(len(split))]
    return Source(
        location=location,
        names=tuple(names),
        members=tuple(range(len(names))),
        reader=PreparedReader(tuple(splits.values())),
        labels=tuple(labels) if manifest.classes else None,
        classes=manifest.classes,
        splits=tuple(name for name, split in splits.items() for _ in range(len(split))),
        content_hash=manifest.hash,
        native_size=manifest.min_side if manifest.min_side == manifest.max_side else None,
    )


register(SourceKind(lambda _, path: is_prepared(path), _open))
