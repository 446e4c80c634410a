"""Zip archives of images."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from movq_cli.data.images import IMAGE_SUFFIXES
from movq_cli.sources.labels import source_of_names
from movq_cli.sources.source import Source, SourceKind, check_bytes, register

PIXELS_MEMBER = "arr_0.npy"
"""Name that numpy gives to the first array of an .npz file; a zip with this member holds pixels, not image files."""


@dataclass(frozen=True)
class ZipReader:
    """Reads the members of a zip archive by their position in it, whatever their compression."""

    path: Path

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BufferedReader(_ForkSafe(self.path)))

    def read(self, member: int) -> bytes:
        """Return the bytes of a member; their checksum is verified."""
        info = self._archive.infolist()[member]
        check_bytes(info.file_size)
        return self._archive.read(info)

    def __reduce__(self) -> tuple[type[ZipReader], tuple[Path]]:
        return ZipReader, (self.path,)


class _ForkSafe(io.RawIOBase):
    """A file whose position belongs to this process: a forked child that seeks does not move its parent's position."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._position = 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: os.fstat(self._file.fileno()).st_size,
        }
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = os.preadv(self._file.fileno(), [buffer], self._position)
        self._position += count
        return count


def member_names(path: Path) -> list[str] | None:
    """Return the names of a zip archive's members, or None for a file of any other type.

    A file with the suffix of an image or of a list is never taken for an archive, even if zip data follows its content.
    """
    is_other = path.suffix.lower() in IMAGE_SUFFIXES | {".txt"}
    if is_other or not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _matches(_: str, path: Path) -> bool:
    names = member_names(path)
    return names is not None and PIXELS_MEMBER not in names


def _open(location: str, path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    # Some programs write backslashes, which the format forbids.
    listing = ["" if info.is_dir() else info.filename.replace("\\", "/") for info in infos]
    return source_of_names(location, listing, ZipReader(path))


register(SourceKind(_matches, _open))
