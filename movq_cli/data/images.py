"""Any image file to 8-bit RGB pixels, and the few operations that a data set is prepared with.

Pixels are taken as stored: colour profiles are not applied, as in the published references of this field.
"""

from __future__ import annotations

import io
import logging
import warnings
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

FILTER = "lanczos"
"""The antialiased filter of every resize; another one moves FID by a whole point."""

MAX_PIXELS = 2**27
"""Refused above: 134 million pixels are 512 MiB as RGBA, and a worker holds a few such copies at once.

A 108-megapixel photograph fits, and the limit lies below the one at which Pillow itself refuses.
"""

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"]) | {
    ".jp2",
    ".avif",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
}
"""What counts as an image in a folder or an archive, in lower case."""

# Named, because Pillow would also run Ghostscript on an EPS file and take nearly any bytes for a TGA.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Without a handler of its own, Pillow's complaints about a broken file would reach stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class BadImageError(ValueError):
    """An image that cannot be used; its text is the reason, a few words."""


def decode(data: bytes, *, background: tuple[int, int, int] = (255, 255, 255), orientation: bool = True) -> Image.Image:
    """Decode an image file; of an animation, the first frame.

    Args:
        data: The file's bytes, in whatever format its name claims.
        background: RGB in 0..255 that transparent pixels are composited over.
        orientation: Turn the image upright as its EXIF says. (Pillow always does so for TIFF.)

    Returns:
        An RGB image, 8 bits a channel, without metadata.

    Raises:
        BadImageError: Not an image, damaged, of unknown value range, or above `MAX_PIXELS`.
    """
    if not data:
        raise BadImageError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
            _check_size(*image.size)
            image.load()
            rgb = _to_rgb(image, background)
            turn = _exif_turn(image) if orientation else None
        except (BadImageError, MemoryError):
            raise  # memory is the machine's fault: skipping would make the set depend on the machine
        except Image.DecompressionBombError:
            raise BadImageError(f"more than {MAX_PIXELS} pixels") from None
        except UnidentifiedImageError:
            raise BadImageError("not an image") from None
        except Exception as error:
            # Pillow's parsers answer damaged bytes with nearly every exception there is.
            raise BadImageError(_reason(error)) from None
    return rgb if turn is None else rgb.transpose(turn)


def resize_short_side(image: Image.Image, size: int, *, upscale: bool) -> Image.Image:
    """Resize so that the short side is `size` pixels, the long one rounded to keep the shape.

    Args:
        image: Any RGB image.
        size: The short side wanted, pixels.
        upscale: Whether a smaller image is enlarged, not refused.

    Returns:
        The resized image; the same object where its short side is `size` already.

    Raises:
        BadImageError: Smaller than `size` without `upscale`, or above `MAX_PIXELS` once enlarged.
    """
    short = min(image.size)
    if short == size:
        return image
    if short < size and not upscale:
        raise BadImageError(f"too small: {image.width} x {image.height} pixels, short side below {size}")
    width, height = (size if side == short else round(side * size / short) for side in image.size)
    _check_size(width, height)
    return image.resize((width, height), Image.Resampling[FILTER.upper()])


def crop(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    """The square of `size` pixels a side whose upper left corner is (left, top)."""
    return image.crop((left, top, left + size, top + size))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of `size` pixels a side; an odd remainder is cut off right and below."""
    if image.size == (size, size):
        return image
    return crop(image, size, (image.width - size) // 2, (image.height - size) // 2)


def encode_png(image: Image.Image, compress_level: int = 1) -> bytes:
    """The image as a PNG file.

    Args:
        image: Any image.
        compress_level: 0..9; 1 is 40% smaller than none and still quick to read, 9 is slow.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


@cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow knows: an unknown name is an error to it."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels is more than {MAX_PIXELS}")


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info.clear()  # Pillow would write the old profile and resolution into the new PNG
    return rgb


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Deep grey scaled, where Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image)
    scaled = np.rint(values.astype(np.float32) * (255.0 / _value_range(image.mode, values)))
    grey = Image.fromarray(scaled.astype(np.uint8))
    key = image.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _value_range(mode: str, values: np.ndarray) -> float:
    """White's value: 65535 for integers (Pillow hands 16-bit PNM out as mode I), by convention for floats."""
    low, high = float(values.min()), float(values.max())
    for white in (1.0, 255.0, 65535.0) if mode == "F" else (65535.0,):
        if low >= 0.0 and high <= white:
            return white
    raise BadImageError(f"grey values {low:g} to {high:g} have no known range")


def _exif_turn(image: Image.Image) -> Image.Transpose | None:
    # Only this one tag: ImageOps.exif_transpose rewrites the whole block and fails on a malformed one.
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None  # the pixels are none the worse for broken metadata


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "truncated" if "truncated" in text.lower() else f"cannot be decoded: {text[:120]}"
