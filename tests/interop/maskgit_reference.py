"""MaskGIT's VQGAN, written from its description, with which its imported weights are compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskGITReference(nn.Module):
    """MaskGIT's VQGAN as published, written from its description: the layers that ours does not have are as they are.

    Args:
        multipliers: Widths of the levels over 32, finest first.
        blocks: Number of residual blocks of each level, in the encoder and in the decoder.
    """

    def __init__(self, multipliers: tuple[int, ...] = (1, 2), blocks: int = 2) -> None:
        super().__init__()
        widths = [32 * multiplier for multiplier in multipliers]
        self.encoder: Any = nn.Module()
        self.decoder: Any = nn.Module()
        self.quantize: Any = nn.Module()
        self.quantize.embedding = nn.Embedding(20, 8)
        last = widths[-1]
        self.encoder.conv_in = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.encoder.down = nn.ModuleList(
            _level(before, width, blocks) for before, width in zip([32, *widths], widths, strict=False)
        )
        self.encoder.mid = nn.ModuleList(MaskGITBlock(last, last) for _ in range(2))
        self.encoder.norm_out = nn.GroupNorm(32, last, eps=1e-6)
        self.encoder.conv_out = nn.Conv2d(last, 8, 1)
        self.decoder.conv_in = nn.Conv2d(8, last, 3, padding=1)
        self.decoder.mid = nn.ModuleList(MaskGITBlock(last, last) for _ in range(2))
        inputs = [*widths[1:], last]
        self.decoder.up = nn.ModuleList(
            _level(before, width, blocks) for before, width in zip(inputs, widths, strict=True)
        )
        for level, width in list(zip(self.decoder.up, widths, strict=True))[1:]:
            level.upsample_conv = nn.Conv2d(width, width, 3, padding=1)
        self.decoder.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.decoder.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map images in [0, 1] to codes [B, h, w] and to reconstructions in [0, 1], not clamped."""
        h = self.encoder.conv_in(pixels)
        for index, level in enumerate(self.encoder.down):
            h = _through(level.block, h)
            h = F.avg_pool2d(h, 2) if index < len(self.encoder.down) - 1 else h
        h = _through(self.encoder.mid, h)
        z = self.encoder.conv_out(F.silu(self.encoder.norm_out(h))).permute(0, 2, 3, 1)
        codes = torch.cdist(z.flatten(0, 2).double(), self.quantize.embedding.weight.double()).argmin(1)
        codes = codes.view(z.shape[:3])
        h = _through(self.decoder.mid, self.decoder.conv_in(self.quantize.embedding(codes).permute(0, 3, 1, 2)))
        for level in reversed(self.decoder.up):
            h = _through(level.block, h)
            if hasattr(level, "upsample_conv"):
                h = level.upsample_conv(F.interpolate(h, scale_factor=2.0))
        return codes, self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))


class MaskGITBlock(nn.Module):
    """A residual block whose shortcut is applied to its own output if the width changes, as in MaskGIT's code."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(width, width, 1, bias=False) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _level(before: int, width: int, blocks: int) -> nn.Module:
    level: Any = nn.Module()
    level.block = nn.ModuleList(MaskGITBlock(before if index == 0 else width, width) for index in range(blocks))
    return level


def _through(blocks: Any, h: Tensor) -> Tensor:
    for block in blocks:
        h = block(h)
    return h
