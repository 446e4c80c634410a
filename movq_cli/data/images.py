"""Decoding of any image file to 8-bit RGB pixels, and the operations that prepare a data set.

Pixels are taken as stored: color profiles are not applied, as in the published references of this field.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import re
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from movq_cli.data import filters, png_chunks
from movq_cli.errors import is_out_of_memory
from movq_cli.image_size import ImageSize, Resolution

WHITE = (255, 255, 255)
"""Color behind transparent pixels unless another one is requested, RGB in 0..255."""

TEXT_KEYWORD = "movq"
"""Keyword of the text that is stored in PNG files."""

MAX_PIXELS = 2**27
"""Largest number of pixels of an image: 134 million are 512 MiB as RGBA, and a worker has a few such arrays at once.

A photograph of 108 megapixels is below it, and it is below Pillow's own limit. `movq prepare --max-pixels` raises it.
"""

MAX_SCANS = 500
"""Largest number of scans of a JPEG. Ten are usual; each one takes as long as decoding the complete image."""

PLUGIN_SUFFIXES = frozenset([".heic", ".heif", ".jxl"])
"""Suffixes of formats that Pillow reads with a plugin only, in lower case: those of `movq[formats]`."""

_PLUGINS = {"pillow_heif": frozenset([".heic", ".heif"]), "pillow_jxl": frozenset([".jxl"])}
"""Modules of the plugins, and the suffixes of the formats that they add."""

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"]) | {
    ".jp2",
    ".avif",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
}
"""Suffixes of the files that are images without a plugin, in lower case."""

# The formats are listed, because Pillow would also run Ghostscript on an EPS file and read nearly any bytes as a TGA.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "HEIF", "JXL")

_JPEG_START, _JPEG_SCAN = b"\xff\xd8", b"\xff\xda"  # markers; the second one stands before each scan

_HEIF_BRANDS = frozenset([b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"])
_AVIF_BRANDS = frozenset([b"avif", b"avis"])
_JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")  # of a bare codestream, and of a file with boxes

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Without a handler, Pillow's log messages about a broken file would be printed to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# `warnings.catch_warnings` changes and restores the filters of all threads, so that in threads it hides too little.
warnings.filterwarnings("ignore", module="PIL")


class BadImageError(ValueError):
    """An image cannot be used; the text is the reason in a few words."""


class ImageOutOfMemoryError(BadImageError):
    """The memory does not suffice for an image, which another machine could use."""


def decode(
    data: bytes,
    *,
    background: tuple[int, int, int] = WHITE,
    orientation: bool = True,
    max_pixels: int = MAX_PIXELS,
    white: int | None = None,
) -> Image.Image:
    """Decode an image file, or the first frame of an animation.

    Args:
        data: Bytes of the file; the content decides the format, not the suffix.
        background: Color that transparent pixels are composited over, RGB in 0..255.
        orientation: Whether the image is turned upright as its EXIF data says. (Pillow always
            does so for TIFF and AVIF, and its plugin for HEIC.)
        max_pixels: Largest number of pixels that is decoded.
        white: Value of white in gray images of 16 bits; larger values are white too. None = 65535.

    Returns:
        An RGB image with 8 bits per channel, without metadata.

    Raises:
        BadImageError: The file is not an image, is damaged, has an unknown range of values, or has more pixels than
            `max_pixels`.
    """
    if not data:
        raise BadImageError("empty file")
    _raise_pillows_limit(max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            _check_size(*image.size, max_pixels)
            image.load()
            _check_size(*image.size, max_pixels)  # a frame can be larger than the canvas that the header declares
            rgb = _to_rgb(image, background, white)
            turn = _exif_turn(image) if orientation else None
        except (BadImageError, MemoryError):
            raise  # too little memory is no property of the image: skipping it would make the set depend on the machine
        except Image.DecompressionBombError as error:
            count = re.search(r"\d+ pixels", str(error))
            raise BadImageError(_too_many(count[0] if count else "its size", max_pixels)) from None
        except UnidentifiedImageError:
            raise BadImageError(_unidentified(data)) from None
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from None
            # Pillow's parsers raise nearly every type of exception for damaged bytes.
            raise BadImageError(_reason(error)) from None
    return rgb if turn is None else rgb.transpose(turn)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that are images in a folder or an archive, in lower case."""
    found = (suffixes for module, suffixes in _PLUGINS.items() if importlib.util.find_spec(module) is not None)
    return IMAGE_SUFFIXES.union(*found)


def declared_pixels(data: bytes) -> int:
    """Return the number of pixels that an image file declares, without decoding it; 0 if it is no image.

    Args:
        data: Bytes of the file.
    """
    if data.startswith(png_chunks.SIGNATURE):  # Opening a PNG file takes as long as copying it.
        width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        return width * height
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return math.prod(_open(data).size)
        except Exception:  # Whatever is wrong with it, decoding it finds the same.
            return 0


def is_jpeg(data: bytes) -> bool:
    """Return whether the content of a file is a JPEG image, whatever its name says."""
    return data.startswith(_JPEG_START)


class Traits(NamedTuple):
    """Traits of an image that allow several decodings: 1 or 0 for an image, or the number of such images in a set."""

    transparent: int  # 1 if it has an alpha channel or a transparent color
    turned: int  # 1 if its EXIF data says that it is not upright
    deep: int  # 1 if it is a gray image with integers of more than 8 bits


def read_traits(data: bytes) -> Traits:
    """Return the traits of an image file from its header, without decoding it; none of them if it is no image.

    Args:
        data: Bytes of the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            turned = _exif_turn(image) is not None
            return Traits(int(image.has_transparency_data), int(turned), int(image.mode.startswith("I")))
        except Exception:  # Whatever is wrong with it, decoding it finds the same.
            return Traits(0, 0, 0)


def deep_maximum(data: bytes) -> int | None:
    """Return the largest value of a gray image with integers of more than 8 bits; None for every other file.

    Args:
        data: Bytes of the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            _check_size(*image.size, MAX_PIXELS)
            return int(np.asarray(image).max()) if image.mode.startswith("I") else None
        except Exception:  # Whatever is wrong with it, decoding it finds the same.
            return None


def check_stored_size(width: int, height: int) -> None:
    """Refuse an image that is too large to be stored: those who read it apply the usual limit.

    Raises:
        BadImageError: It has more pixels than `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels is more than {MAX_PIXELS}, the limit of a resized image")


def resize_to_cover(
    image: Image.Image, resolution: Resolution, *, upscale: bool, filter_name: str = filters.FILTER
) -> Image.Image:
    """Resize an image to the smallest size from which a crop can be cut; its aspect ratio stays, up to rounding.

    For a square, this is the size whose short side is the side of the square.

    Args:
        image: RGB image.
        resolution: Size of the crop.
        upscale: Whether a smaller image is enlarged; otherwise it is an error.
        filter_name: Name of the filter, one of `filters.FILTERS`.

    Returns:
        The resized image; the same object if it already has that size.

    Raises:
        BadImageError: The image is smaller than the crop and `upscale` is false, or the result has more pixels than
            `MAX_PIXELS`.
    """
    size = ImageSize.of(resolution)
    if not upscale and not size.fits_into(ImageSize(image.height, image.width)):
        limit = f"short side below {size}"
        if not size.is_square:
            limit = f"height below {size.height} or width below {size.width}"
        raise BadImageError(f"too small: {image.width} x {image.height} pixels, {limit}")
    height, width = covering_size(ImageSize(image.height, image.width), size)
    if (width, height) == image.size:
        return image
    check_stored_size(width, height)
    return filters.resize(image, width, height, filter_name)


def covering_size(stored: ImageSize, crop: ImageSize) -> ImageSize:
    """Return the smallest size with the aspect ratio of an image, up to rounding, into which a crop fits."""
    if crop.height * stored.width >= crop.width * stored.height:
        return ImageSize(crop.height, round(stored.width * crop.height / stored.height))
    return ImageSize(round(stored.height * crop.width / stored.width), crop.width)


def crop(image: Image.Image, resolution: Resolution, left: int, top: int) -> Image.Image:
    """Return the crop of a size whose upper left corner is (left, top)."""
    height, width = ImageSize.of(resolution)
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, resolution: Resolution) -> Image.Image:
    """Return the central crop of a size; an odd remainder is cut off at the right and the bottom."""
    height, width = ImageSize.of(resolution)
    if image.size == (width, height):
        return image
    return crop(image, resolution, (image.width - width) // 2, (image.height - height) // 2)


def covering_crop(image: Image.Image, resolution: Resolution) -> Image.Image:
    """Resize an RGB image to the smallest size that covers a crop, smaller images too, and return the central crop.

    Raises:
        BadImageError: The resized image would have more pixels than `MAX_PIXELS`.
    """
    return center_crop(resize_to_cover(image, resolution, upscale=True), resolution)


def encode_png(image: Image.Image, compress_level: int = 1, text: str | None = None) -> bytes:
    """Encode an image as a PNG file.

    Args:
        image: The image.
        compress_level: Level of zlib, 0 to 9. Level 1 is 40% smaller than level 0 and still fast to read; 9 is slow.
        text: ASCII text to store beside the image, which `png.read_text` returns; None stores none.
    """
    buffer, info = io.BytesIO(), PngInfo()
    if text is not None:
        info.add_text(TEXT_KEYWORD, text)
    image.save(buffer, "PNG", compress_level=compress_level, pnginfo=info)
    return buffer.getvalue()


@cache
def _formats() -> tuple[str, ...]:
    """Return those of our formats that the installed Pillow supports; an unknown name would be an error."""
    Image.init()
    if ".heic" in image_suffixes():
        importlib.import_module("pillow_heif").register_heif_opener()
    if ".jxl" in image_suffixes():
        importlib.import_module("pillow_jxl")  # The import registers the format.
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    """Open an image without decoding it, and without what can make that take memory or time beyond its pixels."""
    if data.startswith(png_chunks.SIGNATURE):
        data = png_chunks.without_metadata(data)
    elif data.startswith(_JPEG_START) and data.count(_JPEG_SCAN) > MAX_SCANS:
        raise BadImageError(f"more than {MAX_SCANS} scans")
    return Image.open(io.BytesIO(data), formats=_formats())


def _unidentified(data: bytes) -> str:
    """Return what is wrong with a file that is no image of a format that can be read here."""
    kind, suffix = "", ""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        kind, suffix = "a HEIC image", ".heic"
    elif data[4:8] == b"ftyp" and data[8:12] in _AVIF_BRANDS:
        kind, suffix = "an AVIF image", ".avif"
    elif data.startswith(_JXL_STARTS):
        kind, suffix = "a JPEG XL image", ".jxl"
    if suffix in PLUGIN_SUFFIXES - image_suffixes():
        return f"{kind}, which `pip install 'movq[formats]'` reads"
    if kind:
        return f"{kind} that is damaged, or that the installed Pillow cannot read"
    return "not an image"


def _raise_pillows_limit(max_pixels: int) -> None:
    """Raise Pillow's own limit if it is lower. Pillow has one limit for all threads, so it is never lowered again."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(_too_many(f"{width} x {height} pixels", max_pixels))


def _too_many(subject: str, max_pixels: int) -> str:
    return f"{subject} is more than {max_pixels}, the limit that `movq prepare --max-pixels` raises"


def _to_rgb(image: Image.Image, background: tuple[int, int, int], white: int | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image, white)
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info.clear()  # otherwise Pillow would write the old color profile and resolution into the new PNG
    return rgb


def _to_8_bits(image: Image.Image, white: int | None) -> Image.Image:
    """Scale gray values of more than 8 bits; Pillow's own conversion would clip all values above 255 to white."""
    values = np.asarray(image)
    largest = _value_range(image.mode, values) if white is None or image.mode == "F" else float(white)
    scaled = np.rint(values.astype(np.float32) * (255.0 / largest))
    gray = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _value_range(mode: str, values: np.ndarray) -> float:
    """Return the value of white: 65535 for integers (Pillow gives 16-bit PNM mode I), for floats by their range."""
    low, high = float(values.min()), float(values.max())
    for white in (1.0, 255.0, 65535.0) if mode == "F" else (65535.0,):
        if low >= 0.0 and high <= white:
            return white
    raise BadImageError(f"grey values {low:g} to {high:g} have no known range")


def _exif_turn(image: Image.Image) -> Image.Transpose | None:
    # Only this tag is read: ImageOps.exif_transpose rewrites the complete EXIF block and fails on a malformed one.
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None  # an image with broken metadata still has good pixels


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "truncated" if "truncated" in text.lower() else f"cannot be decoded: {text[:120]}"
