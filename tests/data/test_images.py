"""Any file becomes the right pixels, or one short reason."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from movq_cli.data import images
from movq_cli.data.images import BadImageError, center_crop, decode, encode_png, resize_to_cover

rng = np.random.default_rng(0)
RGB = Image.fromarray(rng.integers(0, 256, (7, 11, 3), dtype=np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(data, **options):
    image = decode(data, **options)
    assert image.mode == "RGB" and image.info == {}
    return np.asarray(image)


def png(width, height, depth, color, rows, *chunks):
    """A PNG by hand, for what Pillow cannot write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind):
    image = RGB.quantize(64).convert("RGB") if kind == "GIF" else RGB
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(array(encoded(image, kind, **options)), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "JPEG2000", "WEBP"])
def test_lossy_formats_decode_as_pillow_does(kind):
    data = encoded(RGB, kind)
    assert np.array_equal(array(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied(kind, value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((11, 7) if value < 5 else (7, 11))
    assert np.array_equal(array(data), np.asarray(upright))
    if kind != "TIFF":
        plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(array(data, orientation=False), plain)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_exif_is_no_reason_to_refuse(block, capfd):
    assert array(encoded(RGB, "JPEG", exif=block)).shape == (7, 11, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_unknown_orientation_is_upright(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(array(encoded(RGB, exif=exif)), np.asarray(RGB))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 1, 128, 129, 255, 256, 257, 32768, 65534, 65535]], np.uint16)
    expected = np.rint(values / 257)[..., None].repeat(3, axis=2)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(array(encoded(Image.fromarray(values), kind)), expected), kind


def test_sixteen_bit_grey_keeps_its_transparent_color():
    data = encoded(Image.fromarray(np.array([[0, 255, 511]], np.uint16)), transparency=255)
    assert array(data, background=(9, 8, 7)).tolist() == [[[0, 0, 0], [9, 8, 7], [2, 2, 2]]]


@pytest.mark.parametrize(("white", "values"), [(1, [0, 0.5, 1]), (255, [0, 127.5, 255]), (65535, [0, 32767.5, 65535])])
def test_float_images_are_scaled_by_their_range(white, values):
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert array(data)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[0, np.nan], [-1, 0], [0, np.inf], [0, 1e6]])
def test_float_images_without_a_known_range_are_refused(values):
    with pytest.raises(BadImageError, match="no known range"):
        decode(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))


def test_sixteen_bit_color_and_grey_with_alpha():
    row = struct.pack(">6H", 65535, 0, 32896, 257, 514, 771)
    assert array(png(2, 1, 16, 2, [row])).tolist() == [[[255, 0, 128], [1, 2, 3]]]
    row = struct.pack(">4H", 65535, 65535, 0, 0)
    assert array(png(2, 1, 16, 4, [row]), background=(1, 2, 3)).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_sixteen_bit_color_with_a_transparent_color_decodes():
    row = struct.pack(">6H", 65535, 0, 32896, 257, 514, 771)
    data = png(2, 1, 16, 2, [row], (b"tRNS", struct.pack(">3H", 257, 514, 771)))
    assert array(data)[0, 0].tolist() == [255, 0, 128]


def test_one_bit_and_grey_become_rgb():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert array(encoded(bits)).tolist() == [[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]
    grey = np.array([[0, 77, 255]], np.uint8)
    assert np.array_equal(array(encoded(Image.fromarray(grey)))[..., 1], grey)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_alpha_is_composited_over_the_background(background):
    pixels = rng.integers(0, 256, (5, 6, 4), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = (1, 2, 3, 255), (1, 2, 3, 0)
    got = array(encoded(Image.fromarray(pixels)), background=background).astype(float)
    alpha = pixels[..., 3:] / 255
    exact = pixels[..., :3] * alpha + np.array(background) * (1 - alpha)
    assert np.abs(got - exact).max() <= 1
    assert tuple(got[0, 0]) == (1, 2, 3) and tuple(got[0, 1]) == background


def test_grey_with_alpha_and_palettes_with_transparency():
    la = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), mode="LA")
    assert array(encoded(la), background=(1, 2, 3)).tolist() == [[[7, 7, 7], [1, 2, 3]]]
    palette = Image.new("P", (3, 1))
    palette.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    palette.putdata([0, 1, 2])
    assert array(encoded(palette)).tolist() == [[[250, 0, 0], [0, 250, 0], [0, 0, 250]]]
    one = encoded(palette, transparency=1)
    assert array(one, background=(1, 2, 3)).tolist() == [[[250, 0, 0], [1, 2, 3], [0, 0, 250]]]
    each = encoded(palette, transparency=bytes([0, 255, 0]))
    assert array(each, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [0, 250, 0], [1, 2, 3]]]
    gif = encoded(palette, "GIF", transparency=2)
    assert array(gif, background=(1, 2, 3))[0, 2].tolist() == [1, 2, 3]


def test_cmyk_jpeg_becomes_the_color_it_shows():
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    got = array(encoded(red, "JPEG", quality=95))
    assert np.abs(got.astype(int) - [200, 30, 40]).max() < 12


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_of_an_animation_the_first_frame_is_taken(kind, options):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = (Image.new("RGB", (9, 5), color) for color in colors)
    data = encoded(first, kind, save_all=True, append_images=others, **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
    assert (array(data) == [255, 0, 0]).all() and array(data).shape == (5, 9, 3)


def test_a_name_says_nothing_about_the_format_and_profiles_are_dropped():
    data = encoded(RGB, icc_profile=b"not really a profile", dpi=(300, 300))
    assert encode_png(decode(data)) == encode_png(RGB)
    assert b"iCCP" not in encode_png(decode(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>404</html>", "not an image"),
        (b"\0" * 5000, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (encoded(RGB, "PNG")[:-60], "truncated"),
        (encoded(Image.fromarray(rng.integers(0, 256, (99, 99, 3), dtype=np.uint8)), "JPEG")[:-900], "truncated"),
        (encoded(RGB.resize((99, 99)), "TIFF")[:-900], "truncated"),
        (png(30_000, 30_000, 8, 2, [b""]), "more than 134217728"),
        (png(12, 12_000_000, 8, 2, [b""]), "12 x 12000000 pixels is more than 134217728"),
    ],
)
def test_what_cannot_be_used_has_one_short_reason(data, reason, capfd):
    with pytest.raises(BadImageError) as caught:
        decode(data)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 160 and "\n" not in str(caught.value) and "0x" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_damaged_bytes_are_pixels_or_a_bad_image_and_nothing_else(kind, damage, kept):
    data = bytearray(encoded(RGB, kind))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    try:
        image = decode(bytes(data[: int(kept * len(data)) or 1]))
    except BadImageError as error:
        assert str(error)
    else:
        assert image.mode == "RGB"


def test_damaged_files_leave_stderr_clean():
    # Compressed TIFF apart: libtiff writes its complaints to the descriptor itself.
    code = (
        "import io, warnings, numpy as np\nfrom PIL import Image\n"
        "from movq_cli.data.images import decode, BadImageError\n"
        "rng = np.random.default_rng(1)\n"
        "noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))\n"
        "for kind, options in [('TIFF', {}), ('JPEG', {}), ('PNG', {}), ('WEBP', {})]:\n"
        "    b = io.BytesIO(); noise.save(b, kind, **options); data = bytearray(b.getvalue())\n"
        "    for _ in range(60):\n"
        "        bad = bytearray(data); bad[rng.integers(len(bad))] = 255; bad[rng.integers(len(bad))] = 0\n"
        "        for cut in (len(bad), int(rng.integers(1, len(bad)))):\n"
        "            try: decode(bytes(bad[:cut]))\n"
        "            except BadImageError: pass\n"
        "print('done')"
    )
    run = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("done\n", "")


def test_no_memory_is_not_blamed_on_the_image(monkeypatch):
    def exhausted(image, background, white):
        raise MemoryError

    monkeypatch.setattr(images, "_to_rgb", exhausted)
    with pytest.raises(MemoryError):
        decode(encoded(RGB))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_resizing_gives_the_short_side_keeps_the_shape_and_is_pillows_lanczos(width, height, size):
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    got = resize_to_cover(image, size, upscale=True)
    assert min(got.size) == size
    short = min(width, height)
    assert abs(got.width - width * size / short) <= 0.5 and abs(got.height - height * size / short) <= 0.5
    if short == size:
        assert got is image
    else:
        assert np.array_equal(np.asarray(got), np.asarray(image.resize(got.size, Image.Resampling.LANCZOS)))


def test_small_images_are_refused_and_enlarging_is_bounded():
    with pytest.raises(BadImageError, match=r"^too small: 11 x 7 pixels"):
        resize_to_cover(RGB, 8, upscale=False)
    with pytest.raises(BadImageError, match="256 x 7680000 pixels is more than"):
        resize_to_cover(Image.new("RGB", (1, 30_000)), 256, upscale=True)


def test_crops_are_central():
    pixels = np.asarray(RGB)
    assert np.array_equal(np.asarray(center_crop(RGB, 4)), pixels[1:5, 3:7])
    assert np.array_equal(np.asarray(center_crop(RGB, 7)), pixels[:, 2:9])
    assert np.array_equal(np.asarray(images.crop(RGB, 3, 5, 2)), pixels[2:5, 5:8])


def test_png_is_lossless_at_every_level():
    for level in (0, 1, 9):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(RGB, level)))), np.asarray(RGB))


def test_importing_the_data_modules_imports_no_torch():
    code = (
        "import sys, movq_cli.files, movq_cli.data.images, movq_cli.sources.open, movq_cli.data.shards\n"
        "import movq_cli.commands.prepare\n"
        "assert 'torch' not in sys.modules and 'mlxtend' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
