"""Images as tensors: bytes for storage and transport, [-1, 1] for the models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from movq_cli.data.images import encode_png
from movq_cli.files import atomic_write


def from_array(pixels: NDArray[np.uint8]) -> Tensor:
    """[H, W, 3] uint8 to [3, H, W] uint8."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)  # a copy: Pillow's own memory is not to be written


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 of any shape to float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1], clamped and rounded to the nearest of 256 levels, as uint8 of the same shape."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] uint8 as a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_grid(path: Path, pixels: Tensor, columns: int, scale: int = 1) -> None:
    """Write images [B, 3, H, W] uint8 as one PNG, row by row, each pixel `scale` pixels wide."""
    grid = make_grid(pixels, nrow=columns, padding=2, pad_value=255)
    if scale > 1:
        grid = F.interpolate(grid[None].float(), scale_factor=float(scale), mode="nearest")[0].to(torch.uint8)
    atomic_write(path, encode_png(to_image(grid)))


def evenly_spaced(total: int, wanted: int) -> list[int]:
    """Up to `wanted` indices below `total`, evenly spaced: the first images of a sorted set are all of one class."""
    return [round(place) for place in np.linspace(0, total - 1, min(total, wanted))]


def grid_scale(side: int) -> int:
    """How much to enlarge images of a side so that people can see them in a grid: small ones to about 64 pixels."""
    return max(1, 64 // side)
