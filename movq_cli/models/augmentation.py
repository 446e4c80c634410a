"""Differentiable augmentation of what the discriminator sees (Zhao et al. 2020), for few images.

"Differentiable augmentation for data-efficient GAN training": originals and reconstructions are augmented before each
pass through the discriminator, that of the decoder's adversarial loss included, whose gradient passes back through the
augmentation. The ranges are those of the authors' code, for images in [-1, 1]. B is the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NUMBERS = 7
"""Number of random numbers that decide the augmentation of one image."""


def augment(images: Tensor, kinds: Sequence[str], numbers: Tensor) -> Tensor:
    """Augment each image by random numbers of its own.

    Args:
        images: [B, 3, H, W] float in [-1, 1].
        kinds: Names of augmentations, in the order in which they are applied; see AUGMENTATIONS.
        numbers: Uniform random numbers in [0, 1), [B, NUMBERS]; what is not applied does not use its numbers.

    Returns:
        [B, 3, H, W]; colors may leave [-1, 1].
    """
    for kind in kinds:
        images = AUGMENTATIONS[kind](images, numbers.to(images.dtype)[:, :, None, None, None].unbind(1))
    return images


Numbers = tuple[Tensor, ...]
"""The random numbers of a batch: NUMBERS tensors [B, 1, 1, 1]."""


def _color(images: Tensor, numbers: Numbers) -> Tensor:
    """Change the brightness by up to 0.5, the saturation by a factor up to 2, and the contrast by one of 0.5 to 1.5."""
    brightness, saturation, contrast, *_ = numbers
    images = images + (brightness - 0.5)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _translation(images: Tensor, numbers: Numbers) -> Tensor:
    """Move the image by whole pixels, up to an eighth of its side; zeros follow it."""
    for dimension, number in zip((2, 3), numbers[3:5], strict=True):
        side = images.shape[dimension]
        largest = side // 8
        shift = _integer(number, 2 * largest + 1) - largest
        source = _positions(images, dimension) - shift
        is_inside = (source >= 0) & (source < side)
        images = images.gather(dimension, source.clamp(0, side - 1).expand_as(images)) * is_inside
    return images


def _cutout(images: Tensor, numbers: Numbers) -> Tensor:
    """Replace a rectangle of half the sides, whose center is anywhere in the image, by zeros."""
    is_cut = torch.ones((), dtype=torch.bool, device=images.device)
    for dimension, number in zip((2, 3), numbers[5:7], strict=True):
        side = images.shape[dimension]
        size = side // 2
        first = _integer(number, side + 1 - size % 2) - size // 2
        positions = _positions(images, dimension)
        is_cut = is_cut & (positions >= first) & (positions < first + size)
    return images * ~is_cut


def _integer(number: Tensor, count: int) -> Tensor:
    """Return integers in [0, count) from uniform numbers in [0, 1)."""
    return (number * count).long().clamp(max=count - 1)


def _positions(images: Tensor, dimension: int) -> Tensor:
    """Return the index of each row (dimension 2) or column (dimension 3), as a map that can be broadcast."""
    shape = [1, 1, 1, 1]
    shape[dimension] = images.shape[dimension]
    return torch.arange(images.shape[dimension], device=images.device).view(shape)


AUGMENTATIONS: dict[str, Callable[[Tensor, Numbers], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
"""The augmentations by the name that the setting `train_vq.discriminator_augmentation` gives them."""
