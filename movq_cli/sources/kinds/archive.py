"""Zip archives."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from movq_cli.data.array_files import UNREADABLE_ZIP, member_blocks, reason_of
from movq_cli.errors import BadRequestError
from movq_cli.sources.archives import name_unused_titles, places_of, titles_of
from movq_cli.sources.arrays import ARRAY, ARRAY_REMEDY, open_arrays
from movq_cli.sources.kinds.tars import begins_as_tar
from movq_cli.sources.labels import assemble
from movq_cli.sources.source import Source, SourceKind, check_bytes


class ZipKind(SourceKind):
    """A zip archive of image files or an .npz file of pixels; the content decides, not the suffix."""

    is_fallback = True

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the file is a zip archive, and not a tar whose last file is one."""
        return path is not None and not path.is_dir() and zipfile.is_zipfile(path) and not begins_as_tar(path)

    def open(self, location: str, path: Path | None) -> Source:
        """List the images of the archive."""
        assert path is not None
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if ARRAY in names:
                return open_arrays(location, path, archive)
        if names and all(name.endswith(".npy") for name in names):
            arrays = ", ".join(sorted(name.removesuffix(".npy") for name in names)[:_SHOWN_ARRAYS])
            raise BadRequestError(f"{path} holds the arrays {arrays}, and no arr_0 with images", ARRAY_REMEDY)
        return assemble(location, _file_names(names), ZipReader(path))


_SHOWN_ARRAYS = 8


def open_zips(location: str, paths: Sequence[Path]) -> Source:
    """List the images in several zip archives.

    Args:
        location: Location as the user gave it.
        paths: The archives. Their files are named after their archive too, because names may repeat.

    Returns:
        The source. Labels come from the class folders or the `dataset.json` in the archives; splits come from the
        archives' paths, or from the folders in them.

    Raises:
        BadRequestError: A file is not a zip archive, or there is no image.
    """
    titles = titles_of(paths)
    names: list[str] = []
    members: list[tuple[int, int]] = []
    for number, (path, title) in enumerate(zip(paths, titles, strict=True)):
        try:
            with zipfile.ZipFile(path) as archive:
                files = _file_names(archive.namelist())
        except UNREADABLE_ZIP as error:
            raise BadRequestError(f"cannot read the zip archive {path}: {reason_of(error)}") from None
        names += [f"{title}/{file}" for file in files]
        members += [(number, member) for member in range(len(files))]
    reader = ZipsReader(tuple(map(ZipReader, paths)), tuple(members))
    places = places_of(names, titles, [number for number, _ in members])
    return name_unused_titles(assemble(location, names, reader, places=places), titles)


def _file_names(names: Sequence[str]) -> list[str]:
    """Return the names in a zip archive; some programs write backslashes, which the format forbids."""
    return [name.replace("\\", "/") for name in names]


@dataclass(frozen=True)
class ZipReader:
    """The members of a zip archive with any compression, numbered in the order of its directory."""

    path: Path
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BufferedReader(_ForkSafeFile(self.path)))

    def read(self, member: int) -> bytes:
        """Return the bytes of a member; its checksum is verified."""
        with self.lock:
            info = self._archive.infolist()[member]
            check_bytes(info.file_size, info.compress_size)
            return b"".join(member_blocks(self._archive, info))

    def stamp(self, member: int) -> tuple[int, int]:
        """Return the size and the checksum of a member."""
        with self.lock:
            info = self._archive.infolist()[member]
            return info.file_size, info.CRC

    def __reduce__(self) -> tuple[type[ZipReader], tuple[Path]]:
        return ZipReader, (self.path,)


@dataclass(frozen=True)
class ZipsReader:
    """The members of several zip archives."""

    readers: tuple[ZipReader, ...]
    members: tuple[tuple[int, int], ...]  # number of the archive, and number of the file in it

    def read(self, member: int) -> bytes:
        """Return the bytes of a member; its checksum is verified."""
        archive, inner = self.members[member]
        return self.readers[archive].read(inner)

    def stamp(self, member: int) -> tuple[int, int]:
        """Return the size and the checksum of a member."""
        archive, inner = self.members[member]
        return self.readers[archive].stamp(inner)


class _ForkSafeFile(io.RawIOBase):
    """A file whose position is stored in this process: seeking in a forked child does not move the parent's."""

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


KIND = ZipKind()
