"""Arrays of pixels in .npz files, in the form that guided-diffusion's evaluator reads: the zip kind opens them."""

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
from movq_cli.sources.temporary import extract_copy

ARRAY = "arr_0.npy"
"""Member of an .npz file with the first array that was saved without a name: the pixels."""
_LABELS = "arr_1.npy"
"""Member with the second such array: the labels."""

_LARGE_HEADER = np.lib.format.read_array_header_2_0

_LENGTHS_OFFSET = 26
"""Offset, in the header of a zip's member, of the lengths of its name and of its extra field, two bytes each."""


@dataclass(frozen=True)
class PixelReader:
    """Images that are stored as raw pixels in a file, one after the other."""

    path: Path
    start: int  # offset of the first image, bytes
    shape: tuple[int, ...]  # H, W, 3
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """Return the image as a PNG file."""
        length = math.prod(self.shape)
        check_bytes(length)
        data = self.files.read(self.path, self.start + member * length, length)
        if len(data) < length:
            raise BadImageError("truncated")
        return encode_png(Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(self.shape)), compress_level=0)


def open_arrays(location: str, path: Path, archive: zipfile.ZipFile) -> Source:
    """Open an .npz file as guided-diffusion's evaluator does: `arr_0` has the pixels, `arr_1` the labels, if any.

    Args:
        location: Location as the user gave it.
        path: Path of the file.
        archive: The file, opened; it has a member `ARRAY`.

    Raises:
        BadRequestError: The array does not hold images.
        FailureError: There is no room for a decompressed copy.
    """
    info = archive.getinfo(ARRAY)
    with archive.open(info) as member:
        shape = _pixel_shape(path, member)
        start = member.tell()
    if info.compress_type == zipfile.ZIP_STORED:
        file, start = path, start + _member_offset(path, info)
    else:
        with archive.open(info) as member:
            file = extract_copy(path, member.read, ".npy")
    count = shape[0]
    digits = max(6, len(str(count - 1)))  # of one width, so that the order of the names is that of the array
    labels = _array_labels(archive, count)
    return Source(
        location=location,
        names=tuple(f"{index:0{digits}d}.png" for index in range(count)),
        members=tuple(range(count)),
        reader=PixelReader(file, start, shape[1:]),
        labels=labels,
        classes=() if labels is None else tuple(map(str, range(max(labels) + 1))),
        native_size=shape[1] if shape[1] == shape[2] else None,
    )


def npz_arrays(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz file; an empty set if the file is not one."""
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _pixel_shape(path: Path, member: IO[bytes]) -> tuple[int, ...]:
    """Return the shape N, H, W, 3 of an array of images, whose type must be uint8."""
    read = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(member) == (1, 0) else _LARGE_HEADER
    shape, is_fortran_order, dtype = read(member)
    if is_fortran_order or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise BadRequestError(f"{path} holds {dtype} {list(shape)} as arr_0, not images: uint8 [N, H, W, 3]")
    return tuple(shape)


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the offset of a stored member's bytes. Only the header before them has the lengths that decide it."""
    with path.open("rb") as file:
        file.seek(info.header_offset + _LENGTHS_OFFSET)
        return file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))


def _array_labels(archive: zipfile.ZipFile, images: int) -> tuple[int, ...] | None:
    if _LABELS not in archive.namelist():
        return None
    with archive.open(_LABELS) as member:
        labels = np.lib.format.read_array(member)
    are_labels = labels.shape == (images,) and np.issubdtype(labels.dtype, np.integer) and labels.min() >= 0
    return tuple(labels.tolist()) if are_labels else None
