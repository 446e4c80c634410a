"""Images as tensors: uint8 for storage and transport, floats in [-1, 1] for the models."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


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
