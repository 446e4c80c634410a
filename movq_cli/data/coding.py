"""Images of any size to codes and back: sides that the downsampling factor does not divide are padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from movq_cli.data import pixels
from movq_cli.models.tokenizer import Tokenizer


def encode_batch(model: Tokenizer, originals: Tensor) -> Tensor:
    """The codes of images of any size: what the factor does not divide is padded.

    Args:
        model: The tokenizer.
        originals: [B, 3, H, W] uint8, on the model's device.

    Returns:
        [B, h, w, c] int64, h and w being H and W over the factor, rounded up.
    """
    height, width = originals.shape[-2:]
    factor = model.settings.factor
    # Repeating the border costs fewer codes on nothing than black would.
    return model.encode(F.pad(pixels.to_signed(originals), (0, -width % factor, 0, -height % factor), mode="replicate"))


def decode_batch(model: Tokenizer, codes: Tensor, size: Sequence[int]) -> Tensor:
    """The images of codes [B, h, w, c], uint8 [B, 3, H, W]: what lies beyond `size` (H, W) is cut off."""
    height, width = size
    return pixels.to_bytes(model.decode(codes))[..., :height, :width]
