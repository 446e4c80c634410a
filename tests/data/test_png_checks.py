"""No damaged byte of a PNG passes: the checksum of each chunk is verified, whichever program made the file."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from movq_cli.data import png
from movq_cli.data.images import BadImageError
from movq_cli.data.shards import decode_stored

BOTH = pytest.mark.parametrize("compression", ["none", "zlib"])


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def of_another_program(mode: str = "RGBA") -> bytes:
    """Return a PNG with several chunks: text, a palette, and pixels in more than one piece."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "another program", zip=True)
    buffer = io.BytesIO()
    Image.fromarray(picture(40, 50)).convert(mode).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


FILES = {
    "none": png.encode(picture(9, 11), "none"),
    "zlib": png.encode(picture(9, 11), "zlib"),
    "several blocks": png.encode(picture(150, 200), "none"),
    "alpha": of_another_program(),
    "palette": of_another_program("P"),
}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_noticed(name: str, data: st.DataObject) -> None:
    file = bytearray(FILES[name])
    decode_stored(bytes(file))
    file[data.draw(st.integers(0, len(file) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BadImageError):
        decode_stored(bytes(file))


@pytest.mark.parametrize("name", ["none", "zlib", "palette"])
def test_each_byte_is_covered_and_so_is_each_truncation(name: str) -> None:
    file = FILES[name]
    for position in range(len(file)):
        damaged = bytearray(file)
        damaged[position] ^= 0x40
        with pytest.raises(BadImageError):
            decode_stored(bytes(damaged))
        with pytest.raises(BadImageError):
            decode_stored(file[:position])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damaged_stretches_are_noticed(name: str, data: st.DataObject) -> None:
    file = FILES[name]
    start = data.draw(st.integers(0, len(file) - 1))
    replaced = data.draw(st.binary(min_size=1, max_size=min(64, len(file) - start)))
    damaged = file[:start] + replaced + file[start + len(replaced) :]
    if damaged == file:
        return
    with pytest.raises(BadImageError):
        decode_stored(damaged)


@BOTH
def test_a_damaged_pixel_is_named_by_its_chunk(compression: Literal["none", "zlib"]) -> None:
    file = bytearray(png.encode(picture(20, 20), compression))
    file[600] ^= 1
    with pytest.raises(BadImageError, match="checksum of the chunk 'IDAT' is wrong"):
        png.decode(bytes(file))


@BOTH
def test_a_stream_that_is_longer_than_its_header_says_is_left_to_others(compression: Literal["none", "zlib"]) -> None:
    file = bytearray(png.encode(picture(20, 20), compression))
    file[16:24] = struct.pack(">II", 20, 19)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    assert png.decode(bytes(file)) is None


def test_pixels_that_inflate_beyond_the_header_take_no_memory() -> None:
    body = zlib.compress(bytes(2**28), 9)  # 256 MiB of zeros in 260 kB
    file = bytearray(png.encode(picture(1, 5), "zlib")[:33])
    file += struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    file += png.encode(picture(1, 5), "zlib")[-12:]
    tracemalloc.start()
    assert png.decode(bytes(file)) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_files_of_other_formats_are_not_examined() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(8, 8)).save(buffer, "BMP")
    assert png.decode(buffer.getvalue()) is None
    assert np.array_equal(decode_stored(buffer.getvalue()), picture(8, 8))
