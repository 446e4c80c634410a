"""The filters with which images are resized.

FID between two sets that were resized with different filters differs by as much as one point. Each prepared set
therefore records its filter.

The command line imports this module to print its help. Therefore NumPy and Pillow are imported inside the functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FILTER = "lanczos"
"""The default filter, and the one with which `movq evaluate --crop` resizes."""

VQGAN = "vqgan"
"""Name of the filter of VQGAN's code: albumentations calls OpenCV's INTER_LINEAR, bilinear without antialiasing."""

FILTERS = (FILTER, "bicubic", "bilinear", "hamming", "box", VQGAN)
"""The names of all filters. All but VQGAN's are Pillow's, which average over all pixels that become one."""

_COEFFICIENT_BITS = 11
"""OpenCV computes with integers: the weights of neighbours are multiples of 2 ** -11."""


def resize(image: Image.Image, width: int, height: int, name: str = FILTER) -> Image.Image:
    """Resize an RGB image.

    Args:
        image: The image.
        width: Width of the result in pixels.
        height: Height of the result in pixels.
        name: Name of the filter, one of `FILTERS`.
    """
    import numpy as np
    from PIL import Image

    if name == VQGAN:
        return Image.fromarray(_resize_bilinearly(np.asarray(image), width, height))
    return image.resize((width, height), Image.Resampling[name.upper()])


def _resize_bilinearly(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize pixels [H, W, 3] from the two nearest rows and columns, with OpenCV's rounding."""
    import numpy as np

    columns, column_weights = _neighbours(pixels.shape[1], width, is_row=True)
    rows, row_weights = _neighbours(pixels.shape[0], height, is_row=False)
    result = np.zeros((height, width, 3), np.int32)
    for row, row_weight in zip(rows, row_weights, strict=True):
        lines = pixels[row].astype(np.int32)
        parts = (lines[:, column] * weight[:, None] for column, weight in zip(columns, column_weights, strict=True))
        result += ((sum(parts) >> 4) * row_weight[:, None, None]) >> 16
    return ((result + 2) >> 2).astype(np.uint8)


def _neighbours(before: int, after: int, *, is_row: bool) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the indices of the two nearest pixels of each new pixel, and their weights, both [2, after].

    Args:
        before: Number of pixels of a row or a column.
        after: Number of new pixels.
        is_row: Whether it is a row. Beyond the ends, OpenCV gives a row the weights 1 and 0; a column has the end pixel
            twice, and is rounded twice.
    """
    import numpy as np

    scale = 1.0 / (after / before)
    position = ((np.arange(after) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    fraction = position - first.astype(np.float32)
    if is_row:
        fraction[(first < 0) | (first >= before - 1)] = 0.0
    weights = np.stack([1 - fraction, fraction]) * np.float32(2**_COEFFICIENT_BITS)
    return np.stack([first, first + 1]).clip(0, before - 1), np.rint(weights).astype(np.int32)
