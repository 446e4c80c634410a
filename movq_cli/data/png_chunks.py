"""The chunks of PNG files, of which Pillow verifies few and trusts many."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_USED = frozenset([b"tRNS", b"eXIf"])
"""Kinds of ancillary chunks that the pixels depend on: transparency, and the orientation of the camera."""

_TEXTS = frozenset([b"tEXt", b"zTXt", b"iTXt"])
_ORIENTATION_KEYWORDS = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
"""Start of the text chunks in which some programs store the orientation."""


class Chunk(NamedTuple):
    """A chunk of a PNG file."""

    kind: bytes  # four letters
    start: int  # offset of the chunk in the file, bytes
    end: int  # offset behind the chunk, bytes
    is_intact: bool  # whether its CRC-32 is right

    @property
    def is_critical(self) -> bool:
        """Whether the pixels cannot be decoded without this chunk."""
        return not self.kind[0] & 0x20


def chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the complete chunks of a PNG file, up to its end chunk or to the first one that is truncated.

    Args:
        data: A file that starts with `SIGNATURE`.
    """
    view, start, kind = memoryview(data), len(SIGNATURE), b""
    while kind != b"IEND":
        kind, end = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4])
        if len(kind) < 4 or end > len(data):
            return
        yield Chunk(kind, start, end, zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end]))
        start = end


def without_metadata(data: bytes) -> bytes:
    """Return a PNG file with the chunks that the pixels and their orientation depend on, and without all others.

    Color profiles and texts, which can inflate to gigabytes, are not needed, and damage in them does no harm.

    Args:
        data: A file that starts with `SIGNATURE`. What follows a truncated chunk is unchanged.

    Raises:
        ValueError: A chunk that the pixels depend on is damaged.
    """
    parts, rest = [SIGNATURE], len(SIGNATURE)
    for chunk in chunks(data):
        rest = chunk.end
        if chunk.is_critical and not chunk.is_intact:
            raise ValueError(f"the checksum of the chunk {chunk.kind.decode('latin-1')!r} is wrong")
        if chunk.is_critical or (chunk.is_intact and _is_used(data, chunk)):
            parts.append(data[chunk.start : chunk.end])
    kept = b"".join(parts)
    return data if len(kept) == rest else kept + data[rest:]


def _is_used(data: bytes, chunk: Chunk) -> bool:
    return chunk.kind in _USED or (chunk.kind in _TEXTS and data.startswith(_ORIENTATION_KEYWORDS, chunk.start + 8))
