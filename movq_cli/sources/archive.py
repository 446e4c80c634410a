"""Zip archives."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from movq_cli.sources.arrays import _ARRAY, open_arrays
from movq_cli.sources.labels import assemble
from movq_cli.sources.source import Source, check_bytes


@dataclass(frozen=True)
class ZipReader:
    """Members of a zip, whatever their compression, in the order of its directory."""

    path: Path

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BufferedReader(_ForkSafe(self.path)))

    def read(self, member: int) -> bytes:
        """The member's bytes, their checksum verified."""
        info = self._archive.infolist()[member]
        check_bytes(info.file_size)
        return self._archive.read(info)

    def __reduce__(self) -> tuple[type[ZipReader], tuple[Path]]:
        return ZipReader, (self.path,)


class _ForkSafe(io.RawIOBase):
    """A file whose position lives in this process: a forked child that seeks does not move its parent."""

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


def open_zip(location: str, path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if any(info.filename == _ARRAY for info in infos):
            return open_arrays(location, path, archive)
    # Some packers write backslashes, against the format.
    found = ["" if info.is_dir() else info.filename.replace("\\", "/") for info in infos]
    return assemble(location, found, ZipReader(path))
