"""The views of an image: the crops and the mirror images that a prior learns from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from movq_cli.data import images
from movq_cli.settings import ViewSettings


def of_image(image: NDArray[np.uint8], side: int, settings: ViewSettings) -> NDArray[np.uint8]:
    """All views of an image.

    Args:
        image: [H, W, 3] uint8, as it is stored; both sides at least `side`.
        side: Of the views, pixels.
        settings: Which views.

    Returns:
        [V, 3, side, side] uint8: scale by scale the four corners row by row and the centre, or the centre crop alone;
        then the mirror images of all, in the same order.
    """
    whole = Image.fromarray(image)
    if settings.scales:
        crops = [crop for scale in settings.scales for crop in _five_crops(whole, side, int(scale * side))]
    else:
        crops = [images.center_crop(whole, side)]
    plain = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])
    return np.concatenate([plain, plain[..., ::-1]]) if settings.mirror else plain


def _five_crops(image: Image.Image, side: int, square: int) -> list[Image.Image]:
    """Corners and centre of the image's central square of `square` pixels a side (LlamaGen's crops, its rounding too).

    Every scale starts from the stored pixels, which are resized once. A prepared image with the preset's short side is
    enlarged by it: to store larger ones for these crops would change what stage 1 sees.
    """
    whole = images.center_crop(images.resize_short_side(image, square, upscale=True), square)
    far = square - side
    corners = [images.crop(whole, side, left, top) for top in (0, far) for left in (0, far)]
    return [*corners, images.center_crop(whole, side)]
