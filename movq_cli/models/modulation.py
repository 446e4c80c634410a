"""The spatially conditional norm (equation 4), and the initial features F0 that the decoder can start from.

Shapes: B batch, C activation channels, H W activation size, M condition channels, h w code grid, D quantized channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.settings import ModulationSettings

NORM_EPS = 1e-6
"""Epsilon of VQGAN's GroupNorm, a tenth of PyTorch's default."""


class Norm(nn.GroupNorm):
    """VQGAN's plain GroupNorm; its forward has the signature of SpatialNorm's, so that blocks can use either.

    Args:
        channels: Number of channels, C.
        groups: Number of groups. A group of a single channel would lose the channel's mean, and with it colors.
        affine: Whether the norm has a scale and a bias for each channel.
    """

    def __init__(self, channels: int, groups: int, *, affine: bool = True) -> None:
        super().__init__(groups, channels, eps=NORM_EPS, affine=affine)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalize [B, C, H, W]; the condition is not used."""
        if self.training:
            return super().forward(x)
        # PyTorch's own function refuses groups of a single value, of which training would learn nothing. A trained
        # tokenizer has them where an image is as small as one code, and groups are as small as one channel.
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)


class SpatialNorm(nn.Module):
    """Equation 4: F_i = phi_gamma(z_q) * (F_{i-1} - mu) / sigma + phi_beta(z_q), with GroupNorm's mu and sigma.

    Scale and bias are convolutions of the condition, a map of the size of the code grid, and are upsampled to the size
    of the activation by nearest neighbour. They start at scale 1 and bias 0: with PyTorch's default initialization, the
    product of many small scales would leave almost no signal at the decoder's output.

    Args:
        channels: Number of channels of the activation, C.
        condition_channels: Number of channels of the condition, M.
        groups: Number of groups of the GroupNorm.
        settings: Settings with the kernel size, and whether GroupNorm has affine parameters of its own.
    """

    def __init__(self, channels: int, condition_channels: int, groups: int, settings: ModulationSettings) -> None:
        super().__init__()
        kernel = settings.kernel_size
        self.norm_layer = Norm(channels, groups, affine=settings.affine)
        self.conv_y = nn.Conv2d(condition_channels, channels, kernel, padding=kernel // 2)
        self.conv_b = nn.Conv2d(condition_channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv_y.weight)
        nn.init.ones_(self.conv_y.bias)  # type: ignore[arg-type]  # Conv2d types its bias as optional
        nn.init.zeros_(self.conv_b.weight)
        nn.init.zeros_(self.conv_b.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Normalize and modulate an activation.

        Args:
            x: Activation, [B, C, H, W].
            condition: Condition, [B, M, h, w]; H and W are multiples of h and w.

        Returns:
            [B, C, H, W].
        """
        size = x.shape[-2:]
        if self.conv_y.kernel_size == (1, 1):
            # A pointwise convolution commutes with nearest-neighbour upsampling, and has fewer positions before it.
            scale, bias = _resize(self.conv_y(condition), size), _resize(self.conv_b(condition), size)
        else:
            condition = _resize(condition, size)
            scale, bias = self.conv_y(condition), self.conv_b(condition)
        return torch.addcmul(bias, self.norm_layer(x), scale)


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="nearest")


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor of a shorter float type to float32: a sine of many periods needs the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FourierFeature(nn.Module):
    """F0 as Fourier features of the quantized vector (section 4.4; Tancik et al. 2020), without parameters.

    Each code has a high-frequency signal of its own, so that F0 depends on the image's content; sinusoids of the
    position and learned constants do not.
    """

    def forward(self, quantized: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, 2 D, h, w], values in [-1, 1]."""
        angle = 2 * math.pi * _at_least_float32(quantized)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ProjectedFeature(nn.Module):
    """F0 as the sine of a learned projection of the quantized vector: Fourier features with learned frequencies.

    Args:
        quantized_channels: Number of channels of the quantized vector, D.
        channels: Number of channels of F0, C.
    """

    def __init__(self, quantized_channels: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(quantized_channels, channels, 1)

    def forward(self, quantized: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, C, h, w], values in [-1, 1]."""
        return _at_least_float32(self.projection(quantized)).sin()


class SinusoidFeature(nn.Module):
    """F0 as sine and cosine position embeddings (Vaswani et al. 2017), half of the channels for rows, half for columns.

    Args:
        channels: Number of channels of F0, C, a multiple of 4.
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
    """F0 as a learned constant of the size of the training grid, as in StyleGAN.

    Args:
        channels: Number of channels of F0, C.
        height: Number of rows of code positions in the training grid, h.
        width: Number of its columns, w.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, channels, height, width))

    def forward(self, quantized: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, C, h, w]; for another grid than that of training, the constant is resampled."""
        constant: Tensor = self.constant
        if constant.shape[-2:] != quantized.shape[-2:]:
            constant = F.interpolate(constant, size=quantized.shape[-2:], mode="bilinear", align_corners=False)
        return constant.expand(quantized.shape[0], -1, -1, -1)
