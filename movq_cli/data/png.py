"""The PNGs of a prepared set: plain files to everyone else, read here at nearly the speed of memory.

A PNG says for each row how it was filtered before compression, and any reader has to undo that. What encoders choose
row by row, Paeth's predictor above all, packs photographs 5% smaller than the difference to the row above, and is
undone pixel by pixel; the difference is undone 256 rows at a time. Ours hold one kind of row throughout: not filtered
in stored blocks (`none`), or differences packed at zlib's level 1 (`zlib`).
"""

from __future__ import annotations

import struct
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.images import MAX_PIXELS

Compression = Literal["none", "zlib"]

_PLAIN, _UP = 0, 2  # PNG's numbers of the two filters
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8 = b"\x08\x02\x00\x00\x00"  # bits, colour type, and three zeros: deflate, the five filters, not interlaced
_IMAGE_AT = 41  # bytes of signature, header, and the length and type of the one chunk of image data
_AFTER_IMAGE = 16  # bytes of that chunk's checksum and of the end
_STORED_BYTES = 65_535


def encode(pixels: NDArray[np.uint8], compression: Compression) -> bytes:
    """A PNG file; `none` gives the same bytes everywhere, `zlib` wherever zlib is the same.

    Args:
        pixels: [H, W, 3] uint8, RGB.
        compression: Of the file.
    """
    height, width, _ = pixels.shape
    flat = pixels.reshape(height, -1)
    rows = np.empty((height, 1 + flat.shape[1]), np.uint8)
    rows[:, 0] = _PLAIN if compression == "none" else _UP
    rows[:, 1:] = flat
    if compression == "zlib":
        rows[1:, 1:] -= flat[:-1]
    data = rows.tobytes()
    packed = _stored(data) if compression == "none" else zlib.compress(data, level=1)
    header = struct.pack(">II", width, height) + _RGB_8
    return b"".join([_SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", packed), *_chunk(b"IEND", b"")])


def decode(data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a PNG that `encode` made, [H, W, 3] uint8, perhaps read-only; None of any other, or damaged.

    zlib's checksum of the pixels is verified.
    """
    if len(data) <= _IMAGE_AT + _AFTER_IMAGE or data[24:29] != _RGB_8 or data[37:_IMAGE_AT] != b"IDAT":
        return None
    width, height, chunk = (int.from_bytes(data[start : start + 4]) for start in (16, 20, 33))
    size = height * (1 + 3 * width)
    if data[:8] != _SIGNATURE or chunk != len(data) - _IMAGE_AT - _AFTER_IMAGE or width * height > MAX_PIXELS:
        return None
    try:
        unpacked = zlib.decompress(memoryview(data)[_IMAGE_AT:-_AFTER_IMAGE], bufsize=size)
    except zlib.error:
        return None
    if len(unpacked) != size:
        return None
    rows = np.frombuffer(unpacked, np.uint8).reshape(height, -1)
    kinds, values = rows[:, 0], rows[:, 1:]
    if (kinds == _UP).all():
        values = _summed(values)
    elif kinds.any():
        return None
    return values.reshape(height, width, 3)


def _summed(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Sums of each row [H, W] and all above it, modulo 256.

    By doubling: log2(H) passes over the whole are seven times as fast as numpy's sum along an axis.
    """
    sums = rows.copy()
    reach = 1
    while reach < len(sums):
        sums[reach:] += sums[:-reach].copy()
        reach *= 2
    return sums


def _stored(data: bytes) -> bytes:
    """A zlib stream without compression, the same from every zlib: their level 0 has changed its blocks."""
    parts = [b"\x78\x01"]
    for start in range(0, len(data), _STORED_BYTES):
        block = data[start : start + _STORED_BYTES]
        last = start + _STORED_BYTES >= len(data)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    return b"".join([*parts, struct.pack(">I", zlib.adler32(data))])


def _chunk(kind: bytes, body: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
