"""The size of images: one side of a square, or a height and a width, as settings, options and functions take it."""

from __future__ import annotations

from typing import NamedTuple, Self

Resolution = int | tuple[int, int]
"""Size of images in pixels: the side of a square, or height and width."""


class ImageSize(NamedTuple):
    """Height and width of images, in pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, resolution: Resolution) -> Self:
        """Return the size that a side, or a height and a width, stand for."""
        return cls(resolution, resolution) if isinstance(resolution, int) else cls(*resolution)

    @property
    def is_square(self) -> bool:
        """Whether height and width are equal."""
        return self.height == self.width

    @property
    def resolution(self) -> Resolution:
        """The size as settings and files have it: the side of a square, or height and width."""
        return self.height if self.is_square else (self.height, self.width)

    @property
    def in_words(self) -> str:
        """The size for messages: "256 pixels", or "192x256 pixels (height x width)"."""
        return f"{self} pixels" if self.is_square else f"{self} pixels (height x width)"

    def __str__(self) -> str:
        """Return the size as options take it: "256", or "192x256"."""
        return f"{self.height}" if self.is_square else f"{self.height}x{self.width}"

    def fits_into(self, other: ImageSize) -> bool:
        """Return whether a crop of this size can be cut out of images of another size."""
        return self.height <= other.height and self.width <= other.width
