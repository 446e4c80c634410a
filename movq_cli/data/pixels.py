"""Images as tensors: uint8 for storage and transport, floats in [-1, 1] for the models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from movq_cli.data.images import encode_png
from movq_cli.files import atomic_write

_LINE = 2  # width of the lines between the images of a grid, pixels


def from_array(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert an array [H, W, 3] uint8 to a tensor [3, H, W] uint8."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)  # a copy, because Pillow's own memory is read-only


def to_signed(pixels: Tensor) -> Tensor:
    """Convert uint8 of any shape to float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def to_bytes(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8 of the same shape: clamped, and rounded to the nearest of 256 levels."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """Convert a tensor [3, H, W] uint8 to a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_grid(path: Path, pixels: Tensor, columns: int, scale: int = 1) -> None:
    """Write images as one PNG file, row by row.

    Args:
        path: Path of the PNG file.
        pixels: Images [B, 3, H, W] uint8.
        columns: Number of images in a row.
        scale: Factor by which the images are enlarged.
    """
    grid = _grid(pixels, columns)
    if scale > 1:
        grid = F.interpolate(grid[None].float(), scale_factor=float(scale), mode="nearest")[0].to(torch.uint8)
    atomic_write(path, encode_png(to_image(grid)))


def _grid(pixels: Tensor, columns: int) -> Tensor:
    """Return images [B, 3, H, W] as one picture with white lines of two pixels around them.

    torchvision's `make_grid` does the same, but importing torchvision takes as long as importing torch.
    """
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    framed = F.pad(pixels, (_LINE, 0, _LINE, 0, 0, 0, 0, rows * columns - len(pixels)), value=255)
    _, channels, height, width = framed.shape
    picture = framed.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return F.pad(picture.reshape(channels, rows * height, columns * width), (0, _LINE, 0, _LINE), value=255)


def grid_scale(side: int) -> int:
    """Return the factor that enlarges images of a side to about 64 pixels, so that people can see them in a grid."""
    return max(1, 64 // side)
