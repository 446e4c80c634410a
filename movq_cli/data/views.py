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
        Views [V, 3, H, W] uint8: for each scale above 1 the four corners, row by row, and the centre; for scale 1
        the crops of the smallest size that covers a crop, at its start, centre and end; without scales the centre crop
        only. With `mirror`, the mirror images of all these follow in the same order.
    """
    stored, size = Image.fromarray(image), ImageSize.of(resolution)
    if settings.scales:
        crops = [crop for scale in settings.scales for crop in _crops_at(scale, stored, size)]
    else:
        crops = [images.center_crop(stored, size)]
    plain = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])
    return np.concatenate([plain, plain[..., ::-1]]) if settings.mirror else plain


def _crops_at(scale: float, image: Image.Image, size: ImageSize) -> list[Image.Image]:
    return _three_crops(image, size) if scale == 1 else _five_crops(image, size, scale)


def _three_crops(image: Image.Image, size: ImageSize) -> list[Image.Image]:
    """Return the crops at the start, the centre and the end of the longer side, between which VQGAN draws its crops.

    The short side of the image becomes that of the crops. A square image has the same crop three times.

    Args:
        image: Stored image.
        size: Size of the crops.
    """
    covering = images.resize_to_cover(image, size, upscale=True)
    ends = [(0, 0), (covering.width - size.width, covering.height - size.height)]
    first, last = (images.crop(covering, size, left, top) for left, top in ends)
    return [first, images.center_crop(covering, size), last]


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
