"""Folders of image files, single images, and lists of images."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from movq_cli.data.images import BadImageError
from movq_cli.errors import BadRequestError
from movq_cli.sources.labels import assemble, is_visible
from movq_cli.sources.source import Source, check_bytes


@dataclass(frozen=True)
class FolderReader:
    """Files below a folder."""

    root: Path
    files: tuple[str, ...]

    def read(self, member: int) -> bytes:
        """The file's bytes."""
        path = self.root / self.files[member]
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a file")  # from a pipe one would read for ever
        check_bytes(status.st_size)
        return path.read_bytes()


def open_folder(location: str, path: Path, found: Sequence[str]) -> Source:
    """The images among the files that a folder holds."""
    return assemble(location, found, FolderReader(path, tuple(found)))


def open_image(location: str, path: Path) -> Source:
    """A single image file."""
    return Source(location, (path.name,), (0,), FolderReader(path.parent, (path.name,)))


def open_list(location: str, path: Path) -> Source:
    """Images by their paths, one a line, from the list's folder on; after a tab perhaps a class."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    rows = [line.partition("\t") for line in lines if line.strip()]
    files = tuple(file for file, _, _ in rows)
    if not any((path.parent / file).exists() for file in files):
        remedy = "A list has one path a line, absolute or from the list's folder on, and after a tab perhaps a class."
        raise BadRequestError(f"none of the {len(files)} images that {path} lists is there", remedy)
    source = assemble(location, files, FolderReader(path.parent, files), listed=True)
    given = [rows[member][2].strip() for member in source.members]
    if not all(given):
        return source
    numbers = {name: number for number, name in enumerate(sorted(set(given)))}
    return replace(source, labels=tuple(numbers[name] for name in given), classes=tuple(numbers))


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files below a folder, through links as with `find -L`: those to a folder above are not followed."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            linked = entry.is_symlink() and Path(entry.path).is_dir()
            if linked or entry.is_dir(follow_symlinks=False):
                if is_visible(entry.name):
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {identity})
            else:
                yield prefix + entry.name
