"""PNG files of a prepared set: ordinary files for other programs, which this module reads nearly as fast as memory.

A PNG file stores for each row the filter that was applied before compression, and a reader has to invert it. The
filters that encoders choose row by row, mostly Paeth's predictor, compress photographs 5% better than the difference to
the row above, but are inverted pixel by pixel; the difference is inverted 256 rows at a time. Our files use one filter
for all rows: none, in uncompressed blocks (`none`), or the difference, compressed at zlib's level 1 (`zlib`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.images import MAX_PIXELS, TEXT_KEYWORD, BadImageError
from movq_cli.data.png_chunks import SIGNATURE, Chunk, chunks

Compression = Literal["none", "zlib"]

_NO_FILTER, _UP = 0, 2  # numbers of the two filters in the PNG standard
_BEFORE_SIZE = SIGNATURE + b"\0\0\0\rIHDR"  # the signature, and the length and type of the header
_RGB_8 = b"\x08\x02\x00\x00\x00"  # bit depth, color type, and three zeros: deflate, the five filters, not interlaced
_HEADER = slice(12, 29)  # type and body of the header chunk; its CRC-32 follows
_IMAGE_OFFSET = 41  # bytes of the signature, the header, and the length and type of the only chunk of image data
_AFTER_IMAGE = 16  # bytes of that chunk's checksum and of the end chunk
_END = b"\0\0\0\0IEND\xae\x42\x60\x82"  # the end chunk, which is the same in all files
_ZLIB_HEADER = b"\x78\x01"  # of the streams that `encode` does not compress
_STORED_BYTES = 65_535  # largest number of bytes in an uncompressed block of deflate
_BLOCK_HEADER = struct.Struct("<BHH")  # of such a block: whether it is the last one, its length, and its complement


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
    return b"".join([SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", packed), *_chunk(b"IEND", b"")])


def decode(data: bytes) -> NDArray[np.uint8] | None:
    """Decode a PNG file that `encode` made. The CRC-32 of each chunk is verified, in files of other programs too.

    Returns:
        [H, W, 3] uint8, possibly read-only; None if another program made the file, or if it is no PNG file.

    Raises:
        BadImageError: The file is damaged; the text says where.
    """
    view = memoryview(data)
    if not _has_our_layout(view):
        check(data)
        return None
    _check_crc(view[_HEADER], view[29:33], "IHDR")
    _check_crc(view[37:-_AFTER_IMAGE], view[-_AFTER_IMAGE:-12], "IDAT")
    width, height = (int.from_bytes(data[start : start + 4]) for start in (16, 20))
    size = height * (1 + 3 * width)
    if width * height > MAX_PIXELS:
        return None
    unpacked = _unpack(view[_IMAGE_OFFSET:-_AFTER_IMAGE], size)
    if unpacked is None:
        return None
    rows = np.frombuffer(unpacked, np.uint8).reshape(height, -1)
    filters, values = rows[:, 0], rows[:, 1:]
    if (filters == _UP).all():
        values = _cumulative_sum(values)
    elif filters.any():
        return None
    return values.reshape(height, width, 3)


def check(data: bytes) -> None:
    """Verify the CRC-32 of each chunk of a PNG file. Files of other formats are not examined.

    Pillow does not verify the chunks of pixels, and it ignores damage behind the last pixel.

    Raises:
        BadImageError: A chunk is damaged, or the file is truncated.
    """
    if data.startswith(SIGNATURE):
        for _ in _intact_chunks(data):
            pass


def read_text(data: bytes) -> str | None:
    """Verify every byte of a PNG file, and return the text that `images.encode_png` stored in it.

    Raises:
        BadImageError: The file is damaged, or it is no PNG file.
    """
    if not data.startswith(SIGNATURE):
        raise BadImageError("no PNG file")
    text, end, prefix = None, 0, b"tEXt" + TEXT_KEYWORD.encode() + b"\0"
    for chunk in _intact_chunks(data):
        end = chunk.end
        if data.startswith(prefix, chunk.start + 4):
            text = data[chunk.start + 4 + len(prefix) : end - 4].decode("latin-1")
    if end != len(data):
        raise BadImageError("other bytes follow the end")
    return text


def _intact_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a file that starts with the signature.

    Raises:
        BadImageError: A chunk is damaged, or the file is truncated.
    """
    kind = b""
    for chunk in chunks(data):
        kind = chunk.kind
        if not chunk.is_intact:
            raise BadImageError(f"the checksum of the chunk {kind.decode('latin-1')!r} is wrong")
        yield chunk
    if kind != b"IEND":
        raise BadImageError("truncated")


def _has_our_layout(view: memoryview) -> bool:
    """Return whether a file has the chunks of `encode`: a header of 8-bit RGB, one chunk of pixels, and the end."""
    length = len(view) - _IMAGE_OFFSET - _AFTER_IMAGE
    return (
        length > 0
        and view[:16] == _BEFORE_SIZE
        and view[24:29] == _RGB_8
        and view[33:_IMAGE_OFFSET] == struct.pack(">I4s", length, b"IDAT")
        and view[-len(_END) :] == _END
    )


def _check_crc(chunk: memoryview, expected: memoryview, name: str) -> None:
    if zlib.crc32(chunk) != int.from_bytes(expected):
        raise BadImageError(f"the checksum of the chunk {name!r} is wrong")


def _unpack(packed: memoryview, size: int) -> bytes | None:
    """Decompress the pixels, whose CRC-32 has been verified; None if they are not `size` bytes.

    zlib would compute its own checksum of uncompressed blocks too, which takes five times as long as copying them.
    """
    blocks = _stored_blocks(packed)
    if blocks is not None:
        return b"".join(blocks) if sum(map(len, blocks)) == size else None
    inflate = zlib.decompressobj()
    try:
        unpacked = inflate.decompress(packed, size + 1)  # no more memory than the header's size, whatever follows
    except zlib.error:
        return None
    return unpacked if inflate.eof and len(unpacked) == size else None


def _stored_blocks(packed: memoryview) -> list[memoryview] | None:
    """Return the contents of the blocks of a zlib stream without compression; None if it has other blocks."""
    if packed[: len(_ZLIB_HEADER)] != _ZLIB_HEADER:
        return None
    blocks: list[memoryview] = []
    position, is_last = len(_ZLIB_HEADER), 0
    while not is_last:
        start = position + _BLOCK_HEADER.size
        if start > len(packed):
            return None
        is_last, length, complement = _BLOCK_HEADER.unpack_from(packed, position)
        if is_last > 1 or length ^ complement != 0xFFFF:
            return None
        position = start + length
        blocks.append(packed[start:position])
    return blocks if position + 4 == len(packed) else None  # zlib's checksum follows


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
    parts = [_ZLIB_HEADER]
    for start in range(0, len(data), _STORED_BYTES):
        block = data[start : start + _STORED_BYTES]
        last = start + _STORED_BYTES >= len(data)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    return b"".join([*parts, struct.pack(">I", zlib.adler32(data))])


def _chunk(kind: bytes, body: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
