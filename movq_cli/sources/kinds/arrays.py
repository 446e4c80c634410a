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
from movq_cli.sources.kinds.archive import PIXELS_MEMBER, member_names
from movq_cli.sources.source import Source, SourceKind, check_bytes, register
from movq_cli.sources.temporary import decompressed_copy

_LABELS_MEMBER = "arr_1.npy"
"""Name that numpy gives to the second array of an .npz file, which holds the classes."""

_read_header_of_later_versions = np.lib.format.read_array_header_2_0

_NAME_LENGTHS_OFFSET = 26
"""Offset in the local header of a zip member of two lengths, each of two bytes: its name's and its extra field's."""


@dataclass(frozen=True)
class PixelReader:
    """Reads images whose pixels lie one after another in a file."""

    path: Path
    start: int  # offset of the first image, bytes
    shape: tuple[int, ...]  # H, W, 3
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """Return an image as a PNG file."""
        length = math.prod(self.shape)
        check_bytes(length)
        data = self.files.read(self.path, self.start + member * length, length)
        if len(data) < length:
            raise BadImageError("truncated")
        return encode_png(Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(self.shape)), compress_level=0)


def npz_arrays(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz file; an empty set for a file of any other type."""
    return {name.removesuffix(".npy") for name in member_names(path) or ()}


def _matches(_: str, path: Path) -> bool:
    return PIXELS_MEMBER in (member_names(path) or ())


def _open(location: str, path: Path) -> Source:
    """Open an .npz file with pixels in `arr_0`, uint8 [N, H, W, 3], and optionally classes in `arr_1`, int [N]."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(PIXELS_MEMBER)
        with archive.open(info) as member:
            shape = _image_shape(path, member)
            start = member.tell()
        if info.compress_type == zipfile.ZIP_STORED:
            file, start = path, start + _member_offset(path, info)
        else:
            with archive.open(info) as member:
                file = decompressed_copy(path, member.read, ".npy")
        labels = _read_labels(archive, shape[0])
    digits = max(6, len(str(shape[0] - 1)))  # names of one length are in ascending order
    return Source(
        location=location,
        names=tuple(f"{index:0{digits}d}.png" for index in range(shape[0])),
        members=tuple(range(shape[0])),
        reader=PixelReader(file, start, shape[1:]),
        labels=labels,
        classes=() if labels is None else tuple(map(str, range(max(labels) + 1))),
        native_size=shape[1] if shape[1] == shape[2] else None,
    )


def _image_shape(path: Path, member: IO[bytes]) -> tuple[int, ...]:
    """Return N, H, W, 3 from the header of an array of images.

    Raises:
        BadRequestError: The array is not uint8 [N, H, W, 3] in row-major order.
    """
    is_version_1 = np.lib.format.read_magic(member) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_version_1 else _read_header_of_later_versions
    shape, is_column_major, dtype = read(member)
    if is_column_major or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise BadRequestError(f"{path} holds {dtype} {list(shape)} as arr_0, not images: uint8 [N, H, W, 3]")
    return tuple(shape)


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the offset of an uncompressed member's content, which only its local header tells."""
    with path.open("rb") as file:
        file.seek(info.header_offset + _NAME_LENGTHS_OFFSET)
        return file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))


def _read_labels(archive: zipfile.ZipFile, images: int) -> tuple[int, ...] | None:
    if _LABELS_MEMBER not in archive.namelist():
        return None
    with archive.open(_LABELS_MEMBER) as member:
        labels = np.lib.format.read_array(member)
    is_usable = labels.shape == (images,) and np.issubdtype(labels.dtype, np.integer) and labels.min() >= 0
    return tuple(labels.tolist()) if is_usable else None


register(SourceKind(_matches, _open))
