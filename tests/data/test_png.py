"""Our PNGs: any reader sees the pixels, ours sees no others, and the bytes are fixed."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from movq_cli.data import images, png

rng = np.random.default_rng(0)
BOTH = pytest.mark.parametrize("compression", ["none", "zlib"])


def picture(height, width, smooth=False):
    if smooth:
        rows, columns = np.mgrid[:height, :width]
        return np.stack([rows + columns, 255 - rows, columns * 2], axis=2).astype(np.uint8)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@BOTH
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (7, 11), (256, 256), (257, 341)])
def test_pillow_and_ours_read_the_same_pixels(compression, height, width):
    for smooth in (False, True):
        pixels = picture(height, width, smooth)
        data = png.encode(pixels, compression)
        decoded = png.decode(data)
        assert decoded is not None and np.array_equal(decoded, pixels)
        assert np.array_equal(np.asarray(images.decode(data)), pixels)
        Image.open(io.BytesIO(data)).verify()  # the chunks' checksums too


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["none", "zlib"]), st.randoms())
@settings(max_examples=60, deadline=None)
def test_every_size_comes_back(height, width, compression, random):
    pixels = np.frombuffer(random.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    decoded = png.decode(png.encode(pixels, compression))
    assert decoded is not None and np.array_equal(decoded, pixels)


@BOTH
def test_a_view_with_gaps_is_encoded_as_its_pixels(compression):
    pixels = picture(20, 30)
    assert png.encode(pixels[::2, 3:9], compression) == png.encode(pixels[::2, 3:9].copy(), compression)


def test_uncompressed_bytes_are_fixed_for_ever():
    pixels = (np.arange(200 * 150 * 3) % 251).astype(np.uint8).reshape(200, 150, 3)
    data = png.encode(pixels, "none")
    assert len(data) == 8 + 25 + 12 + 12 + 200 * 451 + 2 * 5 + 6
    assert hashlib.sha256(data).hexdigest().startswith("52d45c0b22ecdfdb")


def test_packed_photographs_are_smaller():
    pixels = np.asarray(Image.effect_noise((256, 256), 20).convert("RGB").resize((512, 512)))
    assert len(png.encode(pixels, "zlib")) < 0.7 * len(png.encode(pixels, "none"))


@pytest.mark.parametrize("level", [0, 1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_others_pngs_are_read_right_or_left_to_others(level, mode):
    image = Image.fromarray(picture(40, 50, smooth=True)).convert(mode)
    found = png.decode(images.encode_png(image, level))
    assert found is None or (mode == "RGB" and np.array_equal(found, np.asarray(image)))


def test_a_header_that_promises_gigabytes_is_not_believed():
    bomb = bytearray(png.encode(picture(4, 5), "zlib"))
    bomb[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    assert png.decode(bytes(bomb)) is None


def test_mixed_filters_are_left_to_others():
    raw = b"\0" + bytes(range(15)) + b"\2" + bytes(15)
    whole = bytearray(png.encode(picture(2, 5), "zlib"))
    body = zlib.compress(raw)
    data = bytes(whole[:33]) + struct.pack(">I", len(body)) + b"IDAT" + body
    data += struct.pack(">I", zlib.crc32(b"IDAT" + body)) + bytes(whole[-12:])
    assert png.decode(data) is None
    assert np.array_equal(np.asarray(images.decode(data))[1], np.asarray(images.decode(data))[0])
