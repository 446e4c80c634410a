"""Pictures for people: images in a grid with headings, and maps of the error of reconstructions.

A grid says in its own file how its images lie, so that they can be cut out of it again. This module needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from movq_cli.console import printable
from movq_cli.data.images import TEXT_KEYWORD, encode_png
from movq_cli.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

LINE = 2
"""Width of the lines between the images of a grid, pixels."""

LARGEST_ERROR = 64
"""Error that has the brightest color of an error map, in levels of 256."""

_FONT_SIZE = 13
"""Size of the headings' letters, pixels."""

_TEXT_LINE = _FONT_SIZE + 9
"""Height of a line of headings, pixels."""

_LEGIBLE = 96
"""Side to which small images are enlarged, at least, so that people can see them, pixels."""

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

# matplotlib's map "magma" at even distances, from no error to the largest one.
_COLORS = np.array(
    [
        (0, 0, 4),
        (28, 16, 68),
        (79, 18, 123),
        (129, 37, 129),
        (181, 54, 122),
        (229, 80, 100),
        (251, 135, 97),
        (254, 194, 135),
        (252, 253, 191),
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Grid:
    """How the images of a picture lie in it; all lengths are pixels of the images, before they are enlarged."""

    height: int
    width: int
    rows: int
    columns: int
    scale: int = 1
    """Factor by which each image is enlarged."""
    left: int = 0
    """Width of the row headings, pixels of the picture."""
    top: int = 0
    """Height of the column headings, pixels of the picture."""
    row_labels: Sequence[str] = field(default=())
    column_labels: Sequence[str] = field(default=())
    caption: int = 0
    """Height of the heading above each image, pixels of the picture."""

    @classmethod
    def from_text(cls, text: str) -> Grid:
        """Read the text that a picture holds.

        Raises:
            ValueError: It does not describe a grid.
        """
        try:
            values: dict[str, Any] = json.loads(text)["grid"]
            grid = cls(**values)
            lengths = (grid.height, grid.width, grid.rows, grid.columns, grid.scale)
            if (
                not all(isinstance(length, int) and length > 0 for length in lengths)
                or min(grid.left, grid.top, grid.caption) < 0
            ):
                raise ValueError("a length of the grid is not positive")
        except (KeyError, TypeError) as error:
            raise ValueError(f"it does not describe a grid: {error}") from None
        return grid

    def corner(self, index: int) -> tuple[int, int]:
        """Return the left and the upper edge of an image, in pixels of the picture, by its index row by row."""
        row, column = divmod(index, self.columns)
        return (
            self.left + (LINE + column * (self.width + LINE)) * self.scale,
            self.top + (LINE + row * (self.height + LINE)) * self.scale + (row + 1) * self.caption,
        )


def legible_scale(height: int, width: int) -> int:
    """Return the factor that enlarges small images so that people can see them."""
    return max(1, math.ceil(_LEGIBLE / max(height, width)))


def save(
    path: Path,
    images: Tensor | NDArray[np.uint8],
    columns: int,
    *,
    title: str = "",
    rows: Sequence[str] = (),
    headings: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> None:
    """Write images as one PNG file, row by row, with headings.

    Args:
        path: Path of the PNG file.
        images: Images, as a tensor [B, 3, H, W] or an array [B, H, W, 3], uint8.
        columns: Number of images in a row.
        title: Heading of the picture, above all others; empty without one.
        rows: Headings of the rows, at their left; empty without them.
        headings: Headings of the columns, above them; empty without them.
        captions: Headings of the images, above each of them; empty without them.
    """
    arrays = images if isinstance(images, np.ndarray) else images.permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = arrays.shape
    columns = min(columns, count)
    scale = legible_scale(height, width)
    font = ImageFont.load_default(_FONT_SIZE)
    rows, headings, captions = (list(map(printable, texts)) for texts in (rows, headings, captions))
    left = 12 + math.ceil(max(font.getlength(text) for text in rows)) if rows else 0
    top = _TEXT_LINE * (bool(title) + bool(headings))
    caption = _TEXT_LINE if captions else 0
    grid = Grid(height, width, -(-count // columns), columns, scale, left, top, rows, headings, caption)
    # The lower right corner is where an image beyond the last row and column would begin.
    size = (left + (LINE + columns * (width + LINE)) * scale, grid.corner(grid.rows * columns)[1] - caption)
    picture = Image.new("RGB", size, "white")
    for index, pixels in enumerate(arrays):
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        picture.paste(tile, grid.corner(index))
    _write_headings(picture, grid, printable(title), captions, font)
    atomic_write(path, encode_png(picture, text=json.dumps({"grid": asdict(grid)})))


def _write_headings(picture: Image.Image, grid: Grid, title: str, captions: Sequence[str], font: Font) -> None:
    """Write the headings of a picture, of its rows and columns, and of its images."""
    draw = ImageDraw.Draw(picture)
    across, down = grid.width * grid.scale, grid.height * grid.scale
    if title:
        draw.text((6, _TEXT_LINE // 2 + 1), _shortened(title, font, picture.width - 12), "black", font, anchor="lm")
    for row, text in enumerate(grid.row_labels):
        draw.text((6, grid.corner(row * grid.columns)[1] + down // 2), text, "black", font, anchor="lm")
    above = [(column, text, grid.top) for column, text in enumerate(grid.column_labels)]
    above += [(index, text, grid.corner(index)[1]) for index, text in enumerate(captions)]
    for index, text, bottom in above:
        center = grid.corner(index)[0] + across // 2, bottom - _TEXT_LINE // 2
        draw.text(center, _shortened(text, font, across + LINE * grid.scale - 4), "black", font, anchor="mm")


def read(path: Path, usual: Grid | None = None) -> tuple[Grid, NDArray[np.uint8]]:
    """Read the images of a grid.

    Args:
        path: Path of the picture.
        usual: Grid of a picture that does not describe its own; None refuses such a picture.

    Returns:
        The grid, and the images [B, H, W, 3] in their original size.

    Raises:
        ValueError: The file is no such picture.
        OSError: The file cannot be read.
    """
    with Image.open(path) as picture:
        text = picture.info.get(TEXT_KEYWORD) if picture.format == "PNG" else None
        pixels = np.asarray(picture.convert("RGB"))
    grid = Grid.from_text(text) if isinstance(text, str) else usual
    if grid is None:
        raise ValueError("it does not say where its images are")
    tiles = []
    for index in range(grid.rows * grid.columns):
        x, y = grid.corner(index)
        tile = pixels[y : y + grid.height * grid.scale : grid.scale, x : x + grid.width * grid.scale : grid.scale]
        if tile.shape != (grid.height, grid.width, 3):
            raise ValueError("it is smaller than the grid that it describes")
        tiles.append(tile)
    return grid, np.stack(tiles)


def error_map(images: NDArray[np.uint8], originals: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mean absolute error of each pixel as a color: black is none, and light yellow 64 levels or more.

    Args:
        images: Images [..., H, W, 3].
        originals: The images that they should equal, of the same shape.
    """
    error = np.abs(images.astype(np.int16) - originals).mean(-1)
    position = np.clip(error / LARGEST_ERROR, 0, 1) * (len(_COLORS) - 1)
    below = np.minimum(position.astype(np.int64), len(_COLORS) - 2)
    share = (position - below)[..., None]
    return ((1 - share) * _COLORS[below] + share * _COLORS[below + 1]).round().astype(np.uint8)


def with_errors(originals: Tensor, reconstructed: Tensor) -> Tensor:
    """Return originals, reconstructions and the maps of their errors, [3 B, 3, H, W] uint8.

    Args:
        originals: Original images [B, 3, H, W] uint8.
        reconstructed: Their reconstructions, of the same shape.
    """
    import torch

    arrays = [images.permute(0, 2, 3, 1).cpu().numpy() for images in (reconstructed, originals)]
    errors = torch.from_numpy(error_map(arrays[0], arrays[1])).permute(0, 3, 1, 2).to(originals.device)
    return torch.cat([originals, reconstructed, errors])


def _shortened(text: str, font: Font, width: int) -> str:
    """Return as much of a text as fits into a width, pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


ROWS = ("original", "reconstruction", f"error, 0 to {LARGEST_ERROR}")
"""Headings of the rows of a picture of reconstructions."""
