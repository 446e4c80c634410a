"""Equation 4, the spatially conditional norm, and the initial feature F0 that it starts from.

Shapes: B batch, C activation channels, H W activation side, M map channels, h w code grid, D quantized channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.settings import NORM_GROUPS, ModulationSettings

NORM_EPS = 1e-6
"""VQGAN's GroupNorm epsilon, a tenth of PyTorch's default."""


class Norm(nn.GroupNorm):
    """VQGAN's plain GroupNorm, called like the modulated one so that a block need not know which it holds."""

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS, affine=affine)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalize [B, C, H, W]; the condition has no part in it."""
        return super().forward(x)


class SpatialNorm(nn.Module):
    """Equation 4: F_i = phi_gamma(z_q) * (F_{i-1} - mu) / sigma + phi_beta(z_q), with GroupNorm's mu and sigma.

    The two affine maps are convolutions of a map at the code grid's size, brought to the activation's by nearest
    neighbour. They start at scale 1 and bias 0: from PyTorch's default initialisation the product of many small
    scales would leave next to no signal at the decoder's output.

    Args:
        channels: C, of the activation.
        condition_channels: M, of the map.
        settings: Kernel size, and whether GroupNorm keeps its own affine parameters.
    """

    def __init__(self, channels: int, condition_channels: int, settings: ModulationSettings) -> None:
        super().__init__()
        kernel = settings.kernel_size
        self.norm_layer = Norm(channels, affine=settings.affine)
        self.conv_y = nn.Conv2d(condition_channels, channels, kernel, padding=kernel // 2)
        self.conv_b = nn.Conv2d(condition_channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv_y.weight)
        nn.init.ones_(self.conv_y.bias)  # type: ignore[arg-type]  # Conv2d types its bias as optional
        nn.init.zeros_(self.conv_b.weight)
        nn.init.zeros_(self.conv_b.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Normalize and modulate an activation.

        Args:
            x: [B, C, H, W].
            condition: [B, M, h, w], H and W being multiples of h and w.

        Returns:
            [B, C, H, W].
        """
        size = x.shape[-2:]
        if self.conv_y.kernel_size == (1, 1):
            # A pointwise convolution commutes with nearest upsampling: convolve the few positions, then spread them.
            scale, bias = _resize(self.conv_y(condition), size), _resize(self.conv_b(condition), size)
        else:
            condition = _resize(condition, size)
            scale, bias = self.conv_y(condition), self.conv_b(condition)
        return torch.addcmul(bias, self.norm_layer(x), scale)


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="nearest")


class FourierFeature(nn.Module):
    """F0 as Fourier features of the quantized vector itself (section 4.4; Tancik et al. 2020): no parameters.

    Each code gives its own high-frequency signal, so that F0 carries the image's content, which sinusoids of the
    position and learned constants do not.
    """

    def forward(self, quantized: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, 2 D, h, w], values in [-1, 1]."""
        angle = 2 * math.pi * quantized.float()
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ProjectedFeature(nn.Module):
    """F0 as the sine of a learned projection of the quantized vector: Fourier features whose frequencies are learned.

    Args:
        quantized_channels: D.
        channels: C.
    """

    def __init__(self, quantized_channels: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(quantized_channels, channels, 1)

    def forward(self, quantized: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, C, h, w], values in [-1, 1]."""
        return self.projection(quantized).float().sin()


class SinusoidFeature(nn.Module):
    """F0 as Vaswani et al.'s sine and cosine position embedding, half the channels for rows, half for columns.

    Args:
        channels: C, a multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, quantized: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, C, h, w], values in [-1, 1], the same for every image."""
        batch, _, height, width = quantized.shape
        rows = self._embed(height, quantized.device)[:, :, None].expand(-1, -1, width)
        columns = self._embed(width, quantized.device)[:, None, :].expand(-1, height, -1)
        return torch.cat([rows, columns]).expand(batch, -1, -1, -1)

    def _embed(self, length: int, device: torch.device) -> Tensor:
        frequencies = self.channels // 4
        exponent = torch.arange(frequencies, device=device, dtype=torch.float32) / frequencies
        angle = torch.arange(length, device=device, dtype=torch.float32) * 10_000.0 ** -exponent[:, None]
        return torch.cat([angle.sin(), angle.cos()])


class ConstantFeature(nn.Module):
    """F0 as a learned constant of the training grid's size, as in StyleGAN.

    Args:
        channels: C.
        grid: h = w, code positions a side.
    """

    def __init__(self, channels: int, grid: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, channels, grid, grid))

    def forward(self, quantized: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, C, h, w]; another grid than the training one gets the constant resampled."""
        constant: Tensor = self.constant
        if constant.shape[-2:] != quantized.shape[-2:]:
            constant = F.interpolate(constant, size=quantized.shape[-2:], mode="bilinear", align_corners=False)
        return constant.expand(quantized.shape[0], -1, -1, -1)
