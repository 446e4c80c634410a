"""Files of several pictures, pages of a TIFF file or frames of an animation, of which the first one is read."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from PIL import Image

from movq_cli.data import png_chunks

_FORMATS = ("GIF", "TIFF", "WEBP")
_STARTS = (b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"RIFF")
"""First bytes of files that may have several pictures; the formats of telephones store previews as further pictures."""

_SUBFILE_TYPE = 254  # TIFF tag
_REDUCED, _MASK = 1, 4  # bits of it: a smaller copy of another page, and a mask for another page
_EXAMINED_PAGES = 32


def has_several(data: bytes) -> bool:
    """Return whether an image file holds further pictures that are neither smaller copies of the first nor masks.

    Args:
        data: Bytes of the file, of which only the headers are decoded.
    """
    if data.startswith(png_chunks.SIGNATURE):
        return _is_animated_png(data)
    if not data.startswith(_STARTS):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if not getattr(image, "is_animated", False):
                return False
            return image.format != "TIFF" or _has_pages(image)
        except Exception:  # Whatever is wrong with it, decoding it finds the same.
            return False


def first_only_warning(names: Sequence[str]) -> str:
    """Return the sentence about files of which only the first picture was used.

    Args:
        names: Names of these files, at least one.
    """
    return (
        f"{len(names)} files hold several pages or frames, such as {min(names)}: only the first of each was used. Save "
        "the others as files of their own to use them"
    )


def _is_animated_png(data: bytes) -> bool:
    """Return whether a PNG file has the chunk of an animation, before its pixels, with more than one frame."""
    start = data.find(b"acTL", 0, data.find(b"IDAT") + 1)
    return start > 0 and int.from_bytes(data[start + 4 : start + 8]) > 1


def _has_pages(image: Image.Image) -> bool:
    """Return whether a TIFF file has a page beside the first that is an image of its own."""
    for page in range(1, _EXAMINED_PAGES):
        try:
            image.seek(page)
        except EOFError:
            return False
        kind = image.tag_v2.get(_SUBFILE_TYPE, 0)  # type: ignore[attr-defined]
        if not kind & (_REDUCED | _MASK):
            return True
    return False
