"""Folders of image files, of archives or of parquet files."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from movq_cli.data.images import BadImageError
from movq_cli.errors import BadRequestError
from movq_cli.sources.archives import is_tar, is_zip
from movq_cli.sources.kinds.archive import open_zips
from movq_cli.sources.kinds.parquet import is_parquet, open_parquet
from movq_cli.sources.kinds.tars import open_tars
from movq_cli.sources.labels import assemble, is_image, unread_warnings
from movq_cli.sources.layout import is_visible
from movq_cli.sources.output_mark import is_output_inside
from movq_cli.sources.source import Source, SourceKind, check_bytes, stamp_of_file

_MAX_VISITS = 1000
"""Largest number of paths to one folder. Folders that link to the next one twice have a path for each subset."""


class FolderKind(SourceKind):
    """Any folder that no other kind takes: of images, or of tars, zips or parquet files without images beside them."""

    is_fallback = True

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the path is a folder."""
        return path is not None and path.is_dir()

    def open(self, location: str, path: Path | None) -> Source:
        """List the images of the folder, or those of its archives or parquet files."""
        assert path is not None
        outputs: list[str] = []
        files = tuple(_walk(path, "", frozenset(), Counter(), path.resolve(), outputs))
        visible = [file for file in files if all(map(is_visible, file.split("/")))]
        has_images = any(map(is_image, visible))
        archives = [] if has_images else sorted(filter(is_tar, visible)) or sorted(filter(is_zip, visible))
        if archives:
            open_archives = open_tars if is_tar(archives[0]) else open_zips
            source = open_archives(location, [path / archive for archive in archives])
            return replace(source, warnings=(*source.warnings, *unread_warnings(set(visible) - set(archives))))
        tables = [] if has_images else sorted(filter(is_parquet, visible))
        if tables:
            return open_parquet(location, [path / table for table in tables], tables)
        if outputs and not has_images:
            message = f"{path} holds no image but in the output of movq: {', '.join(sorted(outputs))}"
            raise BadRequestError(message, "Name one of these folders to read it.")
        source = assemble(location, files, FolderReader(path, files))
        warnings = [f"output of movq was left out: {', '.join(sorted(outputs))}"] if outputs else []
        return replace(source, warnings=(*warnings, *source.warnings))


@dataclass(frozen=True)
class FolderReader:
    """Files below a folder."""

    root: Path
    files: tuple[str, ...]  # paths from `root` on, or absolute ones

    def read(self, member: int) -> bytes:
        """Return the bytes of a file."""
        path = self.root / self.files[member]
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a file")  # reading from a pipe would block for ever
        check_bytes(status.st_size)
        return path.read_bytes()

    def stamp(self, member: int) -> tuple[int, int]:
        """Return the size and the time of change of a file."""
        return stamp_of_file(self.root / self.files[member])


def _walk(
    folder: Path,
    prefix: str,
    parents: frozenset[tuple[int, int]],
    visits: Counter[tuple[int, int]],
    root: Path,
    outputs: list[str],
) -> Iterator[str]:
    """Yield the files below a folder, and the folders that are not read with a slash at the end.

    The folders that hold the output of a command which read this source are appended to `outputs`.

    Links are followed as by `find -L`, except those to a parent folder.

    Raises:
        BadRequestError: Links lead to a folder more than `_MAX_VISITS` times.
    """
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    visits[identity] += 1
    if visits[identity] > _MAX_VISITS:
        raise BadRequestError(
            f"links lead to the folder {folder} more than {_MAX_VISITS} times", "Remove some of them."
        )
    with os.scandir(folder) as entries:
        for entry in entries:
            is_linked_folder = entry.is_symlink() and Path(entry.path).is_dir()
            if is_linked_folder or entry.is_dir(follow_symlinks=False):
                below = f"{prefix}{entry.name}/"
                if not is_visible(entry.name):
                    yield below
                elif is_output_inside(Path(entry.path), root):
                    outputs.append(below)
                else:
                    yield from _walk(Path(entry.path), below, parents | {identity}, visits, root, outputs)
            else:
                yield prefix + entry.name


KIND = FolderKind()
