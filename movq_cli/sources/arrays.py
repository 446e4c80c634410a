"""Arrays of pixels in .npz files, as guided-diffusion's evaluator reads them."""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from movq_cli.data.images import BadImageError, encode_png
from movq_cli.errors import BadRequestError
from movq_cli.files import PositionalFiles
from movq_cli.sources.source import Source, check_bytes
from movq_cli.sources.temporary import copied

_ARRAY, _LABELS = "arr_0.npy", "arr_1.npy"
"""What numpy names the arrays in an .npz file that were given no names."""


_LARGE_HEADER = np.lib.format.read_array_header_2_0


_LENGTHS_AT = 26
"""In the header of a zip's member: the lengths of its name and of what follows the name, two bytes each."""


@dataclass(frozen=True)
class PixelReader:
    """Images that lie one after the other in a file, pixel by pixel."""

    path: Path
    start: int  # of the first image, bytes
    shape: tuple[int, ...]  # H, W, 3
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """The image as a PNG."""
        length = math.prod(self.shape)
        check_bytes(length)
        data = self.files.read(self.path, self.start + member * length, length)
        if len(data) < length:
            raise BadImageError("truncated")
        return encode_png(Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(self.shape)), compress_level=0)


def open_arrays(location: str, path: Path, archive: zipfile.ZipFile) -> Source:
    """An .npz file of images, as guided-diffusion's evaluator reads them: pixels in `arr_0`, classes in `arr_1`."""
    info = archive.getinfo(_ARRAY)
    with archive.open(info) as member:
        shape = _pixel_shape(path, member)
        start = member.tell()
    if info.compress_type == zipfile.ZIP_STORED:
        file, start = path, start + _member_offset(path, info)
    else:
        with archive.open(info) as member:
            file = copied(path, member.read, ".npy")
    labels = _array_labels(archive, shape[0])
    return Source(
        location=location,
        names=tuple(f"{index:06d}.png" for index in range(shape[0])),
        members=tuple(range(shape[0])),
        reader=PixelReader(file, start, shape[1:]),
        labels=labels,
        classes=() if labels is None else tuple(map(str, range(max(labels) + 1))),
        native_size=shape[1] if shape[1] == shape[2] else None,
    )


def npz_arrays(path: Path) -> set[str]:
    """The names of the arrays in an .npz file; empty where it is none."""
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _pixel_shape(path: Path, member: IO[bytes]) -> tuple[int, ...]:
    """N, H, W, 3 of an array of images, which must be of bytes."""
    read = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(member) == (1, 0) else _LARGE_HEADER
    shape, by_columns, dtype = read(member)
    if by_columns or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise BadRequestError(f"{path} holds {dtype} {list(shape)} as arr_0, not images: uint8 [N, H, W, 3]")
    return tuple(shape)


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin, which only the header before them tells."""
    with path.open("rb") as file:
        file.seek(info.header_offset + _LENGTHS_AT)
        return file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))


def _array_labels(archive: zipfile.ZipFile, images: int) -> tuple[int, ...] | None:
    if _LABELS not in archive.namelist():
        return None
    with archive.open(_LABELS) as member:
        labels = np.lib.format.read_array(member)
    usable = labels.shape == (images,) and np.issubdtype(labels.dtype, np.integer) and labels.min() >= 0
    return tuple(labels.tolist()) if usable else None
