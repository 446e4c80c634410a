"""The preset from which `movq presets new` inherits: the one for own images that suits the size of a set's images."""

from __future__ import annotations

import math
from pathlib import Path

from movq_cli import presets
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.image_size import ImageSize
from movq_cli.settings import TokenizerSettings

BASES = "photos-"
"""Beginning of the names of the presets from which a new one can inherit."""


def base_for(images: PreparedSet, data: Path) -> tuple[str, ImageSize | None]:
    """Return the name of the preset that suits a set, and the size of its images if this is a rectangle.

    For squares it is the preset with the largest resolution up to the images' smallest side. For a set of equal
    rectangles it is the one whose area is nearest, of those whose codes can cover the rectangle.

    Args:
        images: The prepared set.
        data: Folder of the set, for the error.

    Raises:
        BadRequestError: The images are smaller than those of every preset.
    """
    bases = {name: presets.load(name).vq for name in presets.available() if name.startswith(BASES)}
    size = images.manifest.size
    if isinstance(size, tuple) and not ImageSize.of(size).is_square:
        rectangle = ImageSize.of(size)
        covering = {name: vq for name, vq in bases.items() if not any(side % vq.factor for side in rectangle)}
        if covering:
            return min(covering, key=lambda name: _ratio_of_areas(covering[name], rectangle)), rectangle
    side = images.manifest.min_side
    fitting = {name: vq for name, vq in bases.items() if max(vq.image_size) <= side}
    if not fitting:
        smallest = min((max(vq.image_size) for vq in bases.values()), default=0)
        raise BadRequestError(
            f"the smallest images of {data} have {side} pixels a side, but the smallest of the presets {BASES}* is "
            f"for {smallest} pixels",
            f"Prepare the set again with --size {smallest} --upscale.",
        )
    return max(fitting, key=lambda name: max(fitting[name].image_size)), None


def _ratio_of_areas(vq: TokenizerSettings, rectangle: ImageSize) -> float:
    """Return the larger area over the smaller one, at least 1."""
    ratio = math.prod(vq.image_size) / math.prod(rectangle)
    return max(ratio, 1 / ratio)
