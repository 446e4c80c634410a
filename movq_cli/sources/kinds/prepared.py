"""Prepared sets, as `movq prepare` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from movq_cli.data.shards import PLAN, SPLITS, PreparedSet, Split, shard_path
from movq_cli.sources.source import Source, SourceKind


class PreparedKind(SourceKind):
    """A folder that holds a prepared set, finished or not."""

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the folder has a plan or a first shard; a folder of samples has a manifest too."""
        return path is not None and ((path / PLAN).is_file() or shard_path(path, "train", 0).is_file())

    def open(self, location: str, path: Path | None) -> Source:
        """List the images of all splits."""
        assert path is not None
        prepared = PreparedSet.open(path)
        manifest = prepared.manifest
        splits = {name: prepared.split(name) for name in SPLITS}
        images = [(name, split.name(index)) for name, split in splits.items() for index in range(len(split))]
        labels = [label for split in splits.values() if split.labels is not None for label in split.labels.tolist()]
        return Source(
            location=location,
            names=tuple(f"{split}/{name}" for split, name in images),
            members=tuple(range(len(images))),
            reader=PreparedReader(tuple(splits.values())),
            labels=tuple(labels) if manifest.classes else None,
            classes=manifest.classes,
            splits=tuple(split for split, _ in images),
            content_hash=manifest.hash,
            native_size=manifest.min_side if manifest.min_side == manifest.max_side else None,
        )


@dataclass(frozen=True)
class PreparedReader:
    """The images of a prepared set: those of its first split, then those of its second one."""

    splits: tuple[Split, ...]

    def read(self, member: int) -> bytes:
        """Return the image's PNG file."""
        for split in self.splits:
            if member < len(split):
                return split.read(member)
            member -= len(split)
        raise IndexError(member)


KIND = PreparedKind()
