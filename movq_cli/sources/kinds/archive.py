"""Zip archives."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from movq_cli.data.array_files import member_blocks
from movq_cli.sources.arrays import ARRAY, open_arrays
from movq_cli.sources.labels import assemble
from movq_cli.sources.source import Source, SourceKind, check_bytes


class ZipKind(SourceKind):
    """A zip archive of image files or an .npz file of pixels; the content decides, not the suffix."""

    is_fallback = True

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the file is a zip archive."""
        return path is not None and not path.is_dir() and zipfile.is_zipfile(path)

    def open(self, location: str, path: Path | None) -> Source:
        """List the images of the archive."""
        assert path is not None
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if ARRAY in names:
                return open_arrays(location, path, archive)
        # Some programs write backslashes, which the format forbids.
        files = [name.replace("\\", "/") for name in names]
        return assemble(location, files, ZipReader(path))


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
