"""PNG files of a prepared set: ordinary files for other programs, which this module reads nearly as fast as memory.

A PNG file stores for each row the filter that was applied before compression, and a reader has to invert it. The
filters that encoders choose row by row, mostly Paeth's predictor, compress photographs 5% better than the difference to
the row above, but are inverted pixel by pixel; the difference is inverted 256 rows at a time. Our files use one filter
for all rows: none, in uncompressed blocks (`none`), or the difference, compressed at zlib's level 1 (`zlib`).
"""

from __future__ import annotations

import struct
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.images import MAX_PIXELS

Compression = Literal["none", "zlib"]

_NO_FILTER, _UP = 0, 2  # numbers of the two filters in the PNG standard
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8 = b"\x08\x02\x00\x00\x00"  # bit depth, color type, and three zeros: deflate, the five filters, not interlaced
_IMAGE_OFFSET = 41  # bytes of the signature, the header, and the length and type of the only chunk of image data
_AFTER_IMAGE = 16  # bytes of that chunk's checksum and of the end chunk
_STORED_BYTES = 65_535  # largest number of bytes in an uncompressed block of deflate


def encode(pixels: NDArray[np.uint8], compression: Compression) -> bytes:
    """Encode an image as a PNG file.

    Args:
        pixels: Image [H, W, 3] uint8, RGB.
        compression: Compression of the file. With `none` the bytes are the same on every machine, with `zlib` only for
            the same version of zlib.
    """
    height, width, _ = pixels.shape
    flat = pixels.reshape(height, -1)
    rows = np.empty((height, 1 + flat.shape[1]), np.uint8)
    rows[:, 0] = _NO_FILTER if compression == "none" else _UP
    rows[:, 1:] = flat
    if compression == "zlib":
        rows[1:, 1:] -= flat[:-1]
    data = rows.tobytes()
    packed = _stored(data) if compression == "none" else zlib.compress(data, level=1)
    header = struct.pack(">II", width, height) + _RGB_8
    return b"".join([_SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", packed), *_chunk(b"IEND", b"")])


def decode(data: bytes) -> NDArray[np.uint8] | None:
    """Decode a PNG file that `encode` made; zlib's checksum of the pixels is verified.

    Returns:
        [H, W, 3] uint8, possibly read-only; None if another program made the file, or if it is damaged.
    """
    if len(data) <= _IMAGE_OFFSET + _AFTER_IMAGE or data[24:29] != _RGB_8 or data[37:_IMAGE_OFFSET] != b"IDAT":
        return None
    width, height, chunk = (int.from_bytes(data[start : start + 4]) for start in (16, 20, 33))
    size = height * (1 + 3 * width)
    if data[:8] != _SIGNATURE or chunk != len(data) - _IMAGE_OFFSET - _AFTER_IMAGE or width * height > MAX_PIXELS:
        return None
    try:
        unpacked = zlib.decompress(memoryview(data)[_IMAGE_OFFSET:-_AFTER_IMAGE], bufsize=size)
    except zlib.error:
        return None
    if len(unpacked) != size:
        return None
    rows = np.frombuffer(unpacked, np.uint8).reshape(height, -1)
    filters, values = rows[:, 0], rows[:, 1:]
    if (filters == _UP).all():
        values = _cumulative_sum(values)
    elif filters.any():
        return None
    return values.reshape(height, width, 3)


def _cumulative_sum(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the sum of each row of [H, W] and all rows above it, modulo 256.

    The distance is doubled in each pass: log2(H) passes over the image are seven times as fast as numpy's cumulative
    sum along an axis.
    """
    sums = rows.copy()
    distance = 1
    while distance < len(sums):
        sums[distance:] += sums[:-distance].copy()
        distance *= 2
    return sums


def _stored(data: bytes) -> bytes:
    """Return a zlib stream without compression. zlib's level 0 is not used, because its blocks differ by version."""
    parts = [b"\x78\x01"]
    for start in range(0, len(data), _STORED_BYTES):
        block = data[start : start + _STORED_BYTES]
        last = start + _STORED_BYTES >= len(data)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    return b"".join([*parts, struct.pack(">I", zlib.adler32(data))])


def _chunk(kind: bytes, body: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
