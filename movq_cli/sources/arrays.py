"""Arrays of pixels in .npz files, in the form that guided-diffusion's evaluator reads: the zip kind opens them."""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from movq_cli.data.array_files import UNREADABLE_ZIP, ArrayHeader, load_member, member_blocks, member_header, reason_of
from movq_cli.data.images import BadImageError, encode_png
from movq_cli.errors import BadRequestError
from movq_cli.files import PositionalFiles
from movq_cli.sources.numbering import class_numbers
from movq_cli.sources.source import Source, check_bytes, stamp_of_file
from movq_cli.sources.temporary import extract_copy

ARRAY = "arr_0.npy"
"""Member of an .npz file with the first array that was saved without a name: the pixels."""

ARRAY_REMEDY = "Save the images with numpy.savez(FILE, images), which calls them arr_0: uint8 [N, H, W, 3]."
"""Sentence for errors: which file of arrays is read as images."""

MAX_IMAGES = 2**24
"""Largest number of images in an array. A name and a number in memory are larger than a tiny image."""

_PIXELS, _LABELS = "arr_0", "arr_1"
"""Names of the array of pixels, and of the second array without a name: the labels."""

_LENGTHS_OFFSET = 26
"""Offset, in the header of a zip's member, of the lengths of its name and of its extra field, two bytes each."""


@dataclass(frozen=True)
class PixelReader:
    """Images that are stored as raw pixels in a file, one after the other."""

    path: Path
    start: int  # offset of the first image, bytes
    shape: tuple[int, ...]  # H, W, 3
    origin: Path  # the .npz file, of which `path` may be a decompressed copy
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """Return the image as a PNG file."""
        length = math.prod(self.shape)
        check_bytes(length)
        data = self.files.read(self.path, self.start + member * length, length)
        if len(data) < length:
            raise BadImageError("truncated")
        return encode_png(Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(self.shape)), compress_level=0)

    def stamp(self, member: int) -> tuple[int, int]:
        """Return the size and the time of change of the .npz file, which all images have in common."""
        return stamp_of_file(self.origin)


def open_arrays(location: str, path: Path, archive: zipfile.ZipFile) -> Source:
    """Open an .npz file as guided-diffusion's evaluator does: `arr_0` has the pixels, `arr_1` the labels, if any.

    Args:
        location: Location as the user gave it.
        path: Path of the file.
        archive: The file, opened; it has a member `ARRAY`.

    Raises:
        BadRequestError: The array does not hold images, or the file is damaged.
        FailureError: There is no room for a decompressed copy.
    """
    try:
        header = member_header(archive, _PIXELS)
        _check_images(path, header)
        labels, label_warnings = _array_labels(path, archive, header.shape[0])
        file, start = _random_access(path, archive, header)
    except UNREADABLE_ZIP as error:
        raise BadRequestError(f"cannot read the array arr_0 of {path}: {reason_of(error)}") from None
    count, height, width, _ = header.shape
    digits = max(6, len(str(count - 1)))  # of one width, so that the order of the names is that of the array
    return Source(
        location=location,
        names=tuple(f"{index:0{digits}d}.png" for index in range(count)),
        members=tuple(range(count)),
        reader=PixelReader(file, start, header.shape[1:], path),
        labels=labels,
        classes=() if labels is None else class_numbers(f"arr_1 of {path}", max(labels)),
        native_size=height if height == width else None,
        label_warnings=label_warnings,
    )


def npz_arrays(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz file; an empty set if the file is not a zip archive.

    Raises:
        BadRequestError: The archive is damaged.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except UNREADABLE_ZIP as error:
        raise BadRequestError(f"{path} is not an .npz file that can be read: {reason_of(error)}") from None


def _check_images(path: Path, header: ArrayHeader) -> None:
    """Refuse an array that is not N images of 8-bit RGB."""
    shape = header.shape
    if header.is_fortran_order or header.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise BadRequestError(f"{path} holds {header} as arr_0, not images: uint8 [N, H, W, 3]")
    if shape[0] > MAX_IMAGES:
        raise BadRequestError(
            f"{path} holds {shape[0]} images, but at most {MAX_IMAGES} can be read from one file",
            "Save them as several files.",
        )


def _random_access(path: Path, archive: zipfile.ZipFile, header: ArrayHeader) -> tuple[Path, int]:
    """Return a file with the values of `arr_0`, uncompressed, and their offset in it."""
    info = archive.getinfo(ARRAY)
    if info.compress_type == zipfile.ZIP_STORED:
        file, start = path, _member_offset(path, info) + header.start
    else:
        remedy = "If its images really are that uniform, save them with numpy.savez, which does not compress."
        blocks = member_blocks(archive, info)
        file = extract_copy(path, blocks, ".npy", compressed=info.compress_size, remedy=remedy)
        start = header.start
    if file.stat().st_size < start + header.size:
        raise ValueError(f"its header promises {header}, which is more than the file holds")
    return file, start


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the offset of a stored member's bytes. Only the header before them has the lengths that decide it."""
    with path.open("rb") as file:
        file.seek(info.header_offset + _LENGTHS_OFFSET)
        return file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))


def _array_labels(path: Path, archive: zipfile.ZipFile, images: int) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the labels in `arr_1`, None if it does not hold a class for each image, and a sentence that says so."""
    try:
        header = member_header(archive, _LABELS)
        unusable = f"arr_1 of {path} holds {header}, not one class number for each of {images} images: it was not used"
        if header.shape != (images,) or not np.issubdtype(header.dtype, np.integer):
            return None, (unusable,)
        labels = load_member(archive, _LABELS)
    except KeyError:
        return None, ()
    except UNREADABLE_ZIP as error:
        raise BadRequestError(f"cannot read the array arr_1 of {path}: {reason_of(error)}") from None
    if labels.min() < 0:
        index = int(labels.argmin())
        return None, (f"arr_1 of {path} holds {labels[index]} for image {index}, no class number: it was not used",)
    return tuple(labels.tolist()), ()
