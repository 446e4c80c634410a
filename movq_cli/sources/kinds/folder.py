"""Folders of image files, single images, and text files that list images."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from movq_cli.data.images import IMAGE_SUFFIXES, BadImageError
from movq_cli.errors import BadRequestError
from movq_cli.sources.labels import is_visible, numbered, source_of_names
from movq_cli.sources.source import Source, SourceKind, check_bytes, register


@dataclass(frozen=True)
class FolderReader:
    """Reads files below a folder."""

    root: Path
    files: tuple[str, ...]
    """Paths relative to `root`, or absolute; the position is the member number."""

    def read(self, member: int) -> bytes:
        """Return the bytes of a file."""
        path = self.root / self.files[member]
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a file")  # reading from a named pipe would never end
        check_bytes(status.st_size)
        return path.read_bytes()


def walk(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it.

    Links are followed as by `find -L`, except links to a folder above, which would never end.
    """
    yield from _walk(folder, "", frozenset())


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            is_linked_folder = entry.is_symlink() and Path(entry.path).is_dir()
            if is_linked_folder or entry.is_dir(follow_symlinks=False):
                if is_visible(entry.name):
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {identity})
            else:
                yield prefix + entry.name


def _open_folder(location: str, path: Path) -> Source:
    files = tuple(walk(path))
    return source_of_names(location, files, FolderReader(path, files))


def _open_image(location: str, path: Path) -> Source:
    return Source(location, (path.name,), (0,), FolderReader(path.parent, (path.name,)))


def _open_list(location: str, path: Path) -> Source:
    """Open a text file with one image path a line, relative to the file's folder, optionally a tab and a class name."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    rows = [line.partition("\t") for line in lines if line.strip()]
    files = tuple(file for file, _, _ in rows)
    if not any((path.parent / file).exists() for file in files):
        remedy = "Give one path a line, absolute or relative to the list's folder, optionally a tab and a class name."
        raise BadRequestError(f"none of the {len(files)} images listed in {path} exists", remedy)
    source = source_of_names(location, files, FolderReader(path.parent, files), keep_all=True)
    classes = [rows[member][2].strip() for member in source.members]
    if not all(classes):
        return source
    labels, names = numbered(classes)
    return replace(source, labels=labels, classes=names)


def _has_suffix(path: Path, suffixes: frozenset[str]) -> bool:
    return path.suffix.lower() in suffixes and path.exists() and not path.is_dir()


register(SourceKind(lambda _, path: path.is_dir(), _open_folder, is_fallback=True))
register(SourceKind(lambda _, path: _has_suffix(path, IMAGE_SUFFIXES), _open_image))
register(SourceKind(lambda _, path: _has_suffix(path, frozenset([".txt"])), _open_list))
