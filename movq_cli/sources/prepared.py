"""Prepared sets as sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from movq_cli.data.shards import SPLITS, PreparedSet, Split
from movq_cli.sources.source import Source


@dataclass(frozen=True)
class PreparedReader:
    """A prepared set's splits, one after the other."""

    splits: tuple[Split, ...]

    def read(self, member: int) -> bytes:
        """The image's PNG."""
        for split in self.splits:
            if member < len(split):
                return split.read(member)
            member -= len(split)
        raise IndexError(member)


def open_prepared(location: str, path: Path) -> Source:
    prepared = PreparedSet.open(path)
    splits = [prepared.split(name) for name in SPLITS]
    places = [(name, index) for name, split in zip(SPLITS, splits, strict=True) for index in range(len(split))]
    manifest = prepared.manifest
    labels = [label for split in splits if split.labels is not None for label in split.labels.tolist()]
    return Source(
        location=location,
        names=tuple(f"{name}/{splits[SPLITS.index(name)].name(index)}" for name, index in places),
        members=tuple(range(len(places))),
        reader=PreparedReader(tuple(splits)),
        labels=tuple(labels) if manifest.classes else None,
        classes=manifest.classes,
        splits=tuple(name for name, _ in places),
        content_hash=manifest.hash,
        native_size=manifest.min_side if manifest.min_side == manifest.max_side else None,
    )
