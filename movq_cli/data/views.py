"""Views of an image: the crops and mirror images that a prior is trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from movq_cli.data import images
from movq_cli.settings import ViewSettings


def of_image(image: NDArray[np.uint8], side: int, settings: ViewSettings) -> NDArray[np.uint8]:
    """Return all views of an image.

    Args:
        image: Stored image [H, W, 3] uint8; both sides are at least `side`.
        side: Side of the views, pixels.
        settings: Settings of the views.

    Returns:
        Views [V, 3, side, side] uint8: for each scale the four corners, row by row, and the centre; without scales the
        centre crop only. With `mirror`, the mirror images of all these follow in the same order.
    """
    stored = Image.fromarray(image)
    if settings.scales:
        crops = [crop for scale in settings.scales for crop in _five_crops(stored, side, int(scale * side))]
    else:
        crops = [images.center_crop(stored, side)]
    plain = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])
    return np.concatenate([plain, plain[..., ::-1]]) if settings.mirror else plain


def _five_crops(image: Image.Image, side: int, square: int) -> list[Image.Image]:
    """Return the corners and the centre of the image's central square (LlamaGen's crops, with its rounding).

    Every scale starts from the stored pixels, so that they are resized only once. If the short side of the stored
    images is `side`, they are enlarged: storing larger images for these crops would change what stage 1 is trained on.

    Args:
        image: Stored image.
        side: Side of the crops, pixels.
        square: Side of the central square after resizing, pixels.
    """
    resized = images.center_crop(images.resize_short_side(image, square, upscale=True), square)
    far = square - side
    corners = [images.crop(resized, side, left, top) for top in (0, far) for left in (0, far)]
    return [*corners, images.center_crop(resized, side)]
