"""Views of an image: the crops and mirror images that a prior is trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from movq_cli.data import images
from movq_cli.image_size import ImageSize, Resolution
from movq_cli.settings import ViewSettings


def of_image(image: NDArray[np.uint8], resolution: Resolution, settings: ViewSettings) -> NDArray[np.uint8]:
    """Return all views of an image.

    Args:
        image: Stored image [H', W', 3] uint8, no smaller than the views.
        resolution: Size of the views.
        settings: Settings of the views.

    Returns:
        Views [V, 3, H, W] uint8: for each scale the four corners, row by row, and the centre; without scales the
        centre crop only. With `mirror`, the mirror images of all these follow in the same order.
    """
    stored, size = Image.fromarray(image), ImageSize.of(resolution)
    if settings.scales:
        crops = [crop for scale in settings.scales for crop in _five_crops(stored, size, scale)]
    else:
        crops = [images.center_crop(stored, size)]
    plain = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])
    return np.concatenate([plain, plain[..., ::-1]]) if settings.mirror else plain


def _five_crops(image: Image.Image, size: ImageSize, scale: float) -> list[Image.Image]:
    """Return the corners and the centre of the image's central part (LlamaGen's crops, with its rounding).

    Every scale starts from the stored pixels, so that they are resized only once. If the stored images have the size of
    the crops, they are enlarged: storing larger images for these crops would change what stage 1 is trained on.

    Args:
        image: Stored image.
        size: Size of the crops.
        scale: Size of the central part after resizing, relative to the crops.
    """
    central = ImageSize(int(scale * size.height), int(scale * size.width))
    resized = images.center_crop(images.resize_to_cover(image, central, upscale=True), central)
    bottom, right = central.height - size.height, central.width - size.width
    corners = [images.crop(resized, size, left, top) for top in (0, bottom) for left in (0, right)]
    return [*corners, images.center_crop(resized, size)]
